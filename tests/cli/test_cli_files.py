"""``torch-quant quantize-files``: the files of a float model become files of integers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import data_of, linked, make_home, run
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from torch_quant import load_checkpoint, sqnr

GROUPS = ("--recipe", "int4_weight_only", "-o", "group_size=32")
ENDS = ("model.embed_tokens", "lm_head")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("files")
    make_home(home)
    return home


@pytest.fixture
def home(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own in which the models of the module lie."""
    return linked(models, tmp_path, monkeypatch)


def codes(folder: str) -> dict[str, torch.Tensor]:
    return {k: x for file in Path(folder).glob("*.safetensors") for k, x in load_file(file).items()}


def test_to_nearest_and_with_data(home: Path) -> None:
    found = data_of("quantize-files", "my-llm", *GROUPS, "--out", "int4", "--dtype", "float32")
    assert found["bytes"]["after"] < 0.5 * found["bytes"]["before"]
    assert found["settings"]["overrides"].keys() == set(ENDS)
    model = LlamaForCausalLM.from_pretrained("my-llm").eval()
    ids = torch.arange(24).reshape(2, 12) % model.config.vocab_size
    loaded = load_checkpoint("int4", backend="reference")
    nearest = sqnr(model(ids).logits, loaded(ids).logits)
    assert nearest > 10.0
    weights = codes("int4")
    assert all(f"{name}.weight" in weights for name in ENDS)
    assert "model.layers.1.mlp.up_proj.weight_packed" in weights

    more = ("-o", "method=gptq", "--data", "texts.txt", "--to", "gptq", "--out", "int4-gptq")
    text = run("quantize-files", "my-llm", *GROUPS, *more).stdout
    assert "in gptq; in float:" in text
    assert not Path("int4-gptq.unfinished").exists()
    assert "model.layers.1.mlp.up_proj.qweight" in codes("int4-gptq")
    written = run("generate", "int4-gptq", "--prompt", "the model", "--max-new-tokens", "2")
    assert written.stdout.strip()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("nowhere", "--out", "x"), "no config.json"),
        (("my-llm", *GROUPS, "-o", "method=gptq", "--out", "x"), "give --data"),
        (("my-llm", *GROUPS, "--data", "texts.txt", "--out", "x"), "would not be read"),
        (("my-llm", *GROUPS, "--out", "my-llm"), "give a new folder"),
        (("my-llm", *GROUPS, "--out", "no/folder"), "mkdir -p no"),
        (("my-llm", "--recipe", "int8_static", "--out", "x"), "compressed-tensors"),
    ],
)
def test_mistakes_name_the_fix_and_write_nothing(
    given: tuple[str, ...], message: str, home: Path
) -> None:
    before = {path.name for path in home.iterdir()}
    assert message in " ".join(run("quantize-files", *given, expect=2).stderr.split())
    assert {path.name for path in home.iterdir()} == before
