"""Whoever loads a folder or file of another kind is told what it is, and which call reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import torch_quant
from torch_quant import InvalidConfig, Quantizer, load_checkpoint, recipes

X = torch.randn(8, 32)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)).eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder or file of each kind, as the package writes them."""
    home, model = tmp_path_factory.mktemp("kinds"), _model()
    quantizer = Quantizer("reference")
    quantizer.calib(model)(X)
    quantized = quantizer.quantize(model)
    torch_quant.save(quantized, home / "model")
    quantizer.save(home / "ranges")
    quantizer.save_summary(home / "summary.json")
    quantizer.to_config(home / "q.yaml")
    torch_quant.export_torchscript(quantized, X, home / "script.pt")
    torch.save(model.state_dict(), home / "weights.pt")
    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    decoder = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    decoder.save_pretrained(home / "float")
    ids = torch.ones(1, 4, dtype=torch.int64)
    overrides = {"op:embedding": None}
    few = Quantizer(recipes.int4_weight_only(group_size=32), overrides=overrides)
    made = few.quantize(decoder, example_inputs={"input_ids": ids})
    torch_quant.export_checkpoint(made, home / "checkpoint", format="compressed-tensors")
    (home / "empty").mkdir()
    whole = (home / "script.pt").read_bytes()
    (home / "broken.pt").write_bytes(whole.replace(b"PK\x01\x02", b"PK\x07\x07"))
    return home


KINDS = {
    "model": r"a quantized model: torch_quant\.load\(folder, model=model\)",
    "ranges": r"a quantizer with its ranges: Quantizer\.load\(folder\)",
    "checkpoint": r"a checkpoint of quantized weights: load_checkpoint\(folder\)",
    "float": r"a float model of transformers: AutoModel\.from_pretrained\(folder\)",
    "summary.json": r"a summary: quantizer\.load_summary\(path\)",
    "q.yaml": r"a configuration: Quantizer\.from_config\(path\)",
    "script.pt": r"TorchScript: torch\.jit\.load",
    "weights.pt": r"of torch\.save: torch\.load",
    "empty": "it is empty",
    "broken.pt": "it is a file, and this is about folders",
    "nowhere": "there is no file or folder of that name",
}
LOADERS: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "load": (lambda path: torch_quant.load(path, model=_model()), {"model"}),
    "Quantizer.load": (Quantizer.load, {"ranges"}),
    "load_checkpoint": (load_checkpoint, {"checkpoint", "float"}),
    "load_summary": (lambda path: Quantizer("reference").load_summary(path),
                     {"summary.json", "q.yaml"}),
    "from_config": (Quantizer.from_config, {"summary.json", "q.yaml"}),
}  # fmt: skip
"""What each reads, and what says of itself why it is not right."""


@pytest.mark.parametrize("loader", LOADERS)
def test_each_kind_says_which_call_reads_it(home: Path, loader: str) -> None:
    load, own = LOADERS[loader]
    for name in KINDS.keys() - own:
        with pytest.raises(InvalidConfig, match=KINDS[name]):
            load(home / name)


def test_each_loader_reads_its_own(home: Path) -> None:
    assert torch_quant.load(home / "model", model=_model())(X).shape == (8, 8)
    assert Quantizer.load(home / "ranges").state.batches == 1
    assert load_checkpoint(home / "checkpoint") is not None
    Quantizer("reference").load_summary(home / "summary.json")
    assert Quantizer.from_config(home / "q.yaml").backend.name == "reference"
