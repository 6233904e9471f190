"""The code of README and documentation runs as it stands there, and what they name exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from thinning import LONG, rarely

import torch_quant
from torch_quant import QConfig, Quantizer, QuantSpec

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
BLOCKS = {page: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for page, text in PAGES.items()}
ELSEWHERE = {"docs/choosing.md", "docs/inductor.md"}
"""What their code does is tested elsewhere, in test_profile and test_export_inductor."""
MOST_WORDS = 900
"""Of the README."""


@pytest.mark.parametrize(
    "page",
    [rarely(page) if page in ELSEWHERE else page for page, blocks in BLOCKS.items() if blocks],
)
def test_every_block_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [each for each in BLOCKS[page] if LONG or "compiled_steps" not in each]
    if not any(name in block for block in blocks for name in ("INDUCTOR", "compiled_steps")):
        importlib.import_module("torch._inductor.config")  # which keeps the compiler it finds
        monkeypatch.setenv("CXX", "none")  # and "fastest" has one backend less to try
    namespace: dict[str, Any] = {}
    with torch.enable_grad():  # as a reader has it
        for block in blocks:
            exec(block, namespace)
    if page == "README.md":
        assert "of the multiply-accumulates in int8" in capsys.readouterr().out
        assert (tmp_path / "model_int8").is_dir()


def test_the_reference_has_all_that_is_public() -> None:
    """``make docs`` builds it, and fails where a name is none."""
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")]
    found = [name for page in pages for name in re.findall(r"^::: torch_quant\.(\w+)$", page, re.M)]
    assert len(found) == len(set(found))
    assert set(torch_quant.__all__) - set(found) == {"FLOAT", "BFLOAT16", "__version__"}


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].split()) <= MOST_WORDS


def test_the_configuration_file(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGES["docs/configuration.md"], re.DOTALL)
    path = tmp_path / "q.yaml"
    path.write_text(text)
    quantizer = Quantizer.from_config(path)
    quantizer.to_config(tmp_path / "again.yaml")
    again = Quantizer.from_config(tmp_path / "again.yaml")
    assert again.to_config() == quantizer.to_config()
    assert again.overrides["re:.*\\.query"] == QConfig(input=QuantSpec.of(bits=7))

    class Bert(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [torch.nn.ModuleDict({"query": torch.nn.Linear(8, 8)}) for _ in range(2)]
            self.encoder = torch.nn.ModuleDict({"layer": torch.nn.ModuleList(layers)})
            self.classifier = torch.nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.encoder["layer"]:
                x = layer["query"](x)
            return self.classifier(x)

    model = Bert()
    quantizer.calib(model)(torch.randn(4, 8))
    quantizer.quantize(model)
    activations = {name: site.activation for name, site in quantizer.plan.items()}
    assert quantizer.plan.quantized == ("encoder.layer.1.query",)
    assert activations["encoder.layer.1.query"] == QuantSpec.of(bits=7)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        assert (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_and_commands_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", PAGES[page], re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"\b((?:examples|benchmarks)/\w+\.py)", PAGES[page]):
        assert (ROOT / path).is_file(), path
