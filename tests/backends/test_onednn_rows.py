"""Layer norms, residual sums and smoothing between products on ONEDNN, in one pass."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from models import normal, seeded, tiny_transformer
from test_onednn_products import both, operators
from torch import Tensor, nn
from torch.nn import functional as F

import torch_quant
from torch_quant import Backend, QConfig, SmoothQuant, export_torchscript, native, sqnr

pytestmark = pytest.mark.skipif(
    Backend.ONEDNN.unavailable() is not None or native.unavailable() is not None,
    reason=f"{Backend.ONEDNN.unavailable() or native.unavailable()}",
)

SMOOTH = QConfig(transforms=(SmoothQuant(0.8),))
ROWS = {"norm_rows", "round_rows"}


class Block(nn.Module):
    """A feed-forward block with its norm and its residual sum where transformers have them."""

    def __init__(self, way: str, width: int = 24) -> None:
        super().__init__()
        self.way = way
        self.norm = nn.LayerNorm(width, elementwise_affine=way != "no affine")
        self.up, self.down = nn.Linear(width, 40), nn.Linear(40, width)
        self.approximate = "tanh" if way == "tanh" else "none"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.way == "norm of a sum":
            x = self.norm(x + y)
            return x + self.feed(x)
        if self.way == "sum and norm":
            x = x + y
            return x + self.feed(self.norm(x))
        if self.way == "sum read before":
            total = x + y
            half = total * 0.5
            return half + self.feed(self.norm(total)) + total
        if self.way == "broadcast sum":
            return self.feed(self.norm(x + y[:1]))
        if self.way == "scaled sum":
            return self.feed(self.norm(torch.add(x, y, alpha=2)))
        if self.way == "norm of two dimensions":
            return self.feed(F.layer_norm(x, (7, 24)))
        if self.way == "two readers":
            normed = self.norm(x)
            return self.feed(normed) + self.up(normed.flip(-1)).mean()
        return self.feed(self.norm(x)) + y

    def feed(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


WAYS = {
    "norm of a sum": (1, 0),
    "sum and norm": (1, 0),
    "sum read before": (1, 0),
    "broadcast sum": (1, 0),
    "scaled sum": (1, 0),
    "norm of two dimensions": (0, 1),
    "no affine": (1, 0),
    "tanh": (1, 0),
    "two readers": (1, 1),
}
"""How many norms, and how many other quantizers, are one pass when all inputs are smoothed.

The linear layer before the function does what is behind it.
"""


@pytest.mark.parametrize("way", WAYS)
def test_blocks_agree_with_the_reference(way: str) -> None:
    model = seeded(lambda: Block(way)).eval()
    inputs = (normal(3, 7, 24), normal(3, 7, 24))
    others = (normal(5, 2 if way != "norm of two dimensions" else 7, 24),) * 2
    for qconfig in (QConfig(), SMOOTH):
        found, same = both(model, inputs, qconfig=qconfig)
        called = operators(found)
        assert sqnr(same(*inputs), found(*inputs)) > 40
        assert sqnr(same(*others), found(*others)) > 40
        norms = WAYS[way][0]
        assert called.count("norm_rows") == norms
        if qconfig is SMOOTH:
            assert (norms, called.count("round_rows")) == WAYS[way]
            assert "onednn_quantize" not in called
            assert sum("layer_norm" in each for each in called) == 1 - norms
            assert "mul" not in called or way == "sum read before"
    float_output = model(*inputs)
    assert sqnr(float_output, found(*inputs)) > 25


def test_a_broadcast_sum_is_not_part_of_the_pass_at_any_batch_size() -> None:
    """At batch 1 both sides look alike; the batch is free."""
    model = seeded(lambda: Block("broadcast sum")).eval()
    found, same = both(model, (normal(1, 7, 24), normal(1, 7, 24)), qconfig=SMOOTH)
    for batch in (1, 4):
        inputs = (normal(batch, 7, 24), normal(batch, 7, 24))
        assert sqnr(same(*inputs), found(*inputs)) > 40


def test_what_else_reads_a_norm_gets_floats() -> None:
    model = seeded(lambda: Block("norm of a sum")).eval()
    found, same = both(model, (normal(3, 7, 24), normal(3, 7, 24)))
    model.up.weight.zero_(), model.up.bias.zero_()
    inputs = (normal(3, 7, 24), normal(3, 7, 24))
    assert sqnr(same(*inputs), found(*inputs)) > 40


def test_a_transformer_is_copied_saved_compiled_and_exported(tmp_path: Path) -> None:
    model = tiny_transformer().eval()
    tokens, mask = torch.arange(24).reshape(2, 12) % 11, torch.ones(2, 12)
    found, _ = both(model, (tokens, mask), qconfig=SMOOTH)
    assert set(operators(found)) >= ROWS
    expected = found(tokens, mask)

    def equal(other: Any) -> bool:
        return torch.equal(other(tokens, mask), expected)

    assert equal(copy.deepcopy(found))
    torch_quant.save(found, tmp_path / "saved")
    assert equal(torch_quant.load(tmp_path / "saved", model=model))
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    assert equal(torch.load(file, weights_only=False))
    export_torchscript(found, (tokens, mask), tmp_path / "traced.pt")
    assert equal(torch.jit.load(tmp_path / "traced.pt"))
    assert equal(torch.export.export(found, (tokens, mask)).module())
    assert equal(torch.compile(found, backend="aot_eager", fullgraph=True))
