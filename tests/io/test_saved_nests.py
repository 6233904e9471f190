"""Saved models whose attributes hold tensors in lists and dictionaries."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from models import normal, seeded
from test_saved_models import skeleton
from torch import Tensor, nn

import torch_quant
from torch_quant import Quantizer, load, save


class Recurrent(nn.Module):
    """Layers that keep their weights in lists, and tensors in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(8, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.outer = nn.GRU(16, 8, batch_first=True)
        self.head = nn.Linear(8, 4)
        self.tables = {"bias": [torch.randn(4)], "names": ("a", 2)}

    def forward(self, x: Tensor) -> Tensor:
        steps = self.outer(self.inner(x)[0])[0]
        logits: Tensor = self.head(steps) + self.tables["bias"][0]  # type: ignore[index]
        return logits


IN_FLOAT = {"inner": None, "outer": None}


def test_tensors_in_lists_and_dictionaries(tmp_path: Path) -> None:
    """A layer in float runs its own code, on weights that it has a list of."""
    model, x = seeded(Recurrent), normal(2, 5, 8)
    quantizer = Quantizer(
        torch_quant.recipes.int8_dynamic(), backend="reference", overrides=IN_FLOAT
    )
    quant_model = quantizer.quantize(model, example_inputs=(x,))
    save(quant_model, tmp_path)
    loaded: Any = load(tmp_path, skeleton(model))
    assert torch.equal(loaded(x), quant_model(x))
    assert loaded.inner._flat_weights[0] is loaded.inner.weight_ih_l0
    assert loaded.tables["names"] == ("a", 2)
    save(loaded, tmp_path / "again")
    again: Any = load(tmp_path / "again", skeleton(model))
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again(x), quant_model(x))
    again.outer.weight_ih_l0 += 1
    assert not torch.equal(again(x), quant_model(x))
    assert torch.equal(copy.deepcopy(loaded)(normal(3, 9, 8)), quant_model(normal(3, 9, 8)))
