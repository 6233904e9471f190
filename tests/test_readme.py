"""The README's code runs as it stands there, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_quant import QConfig, Quantizer, QuantSpec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_every_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    with torch.enable_grad():  # as a reader has it
        for block in BLOCKS:
            exec(block, namespace)
    assert "of the multiply-accumulates in int8" in capsys.readouterr().out
    assert (tmp_path / "model_int8.pt").is_file()
    assert len(BLOCKS) >= 3


def test_the_configuration_file(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
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


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
