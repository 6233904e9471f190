"""Parts of a size that is free: the file cuts every size as the model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flows import calibrated
from models import images, normal, seeded
from onnx_files import feeds, needs, operators, run_onnxruntime, tensors, written
from thinning import rarely
from torch import Tensor, nn

from torch_quant import sqnr

pytestmark = needs("onnx", "onnxscript", "onnxruntime")


class Cut(nn.Module):
    """Convolutions with a cut between them, of an axis whose size is free, or of channels."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(torch.cat([x, x.flip(-1)]) if self.how == "halves" else x)
        if self.how == "halves":
            first, second = x.chunk(2)
            return self.last(first) - second.mean()
        if self.how == "thirds":
            first, second, third = x.split((x.shape[-1] + 2) // 3, -1)
            return torch.cat([self.last(first + second), self.last(third)], -1)
        first, second = x.chunk(2, 1) if self.how == "channels" else torch.chunk(x, 2, dim=-1)
        return self.last(torch.cat([second, first], 1 if self.how == "channels" else -1))


@pytest.mark.parametrize("how", ["halves", "thirds", rarely("columns"), "channels"])
def test_every_size_is_cut(how: str, tmp_path: Path) -> None:
    model, file = seeded(lambda: Cut(how)), tmp_path / "m.onnx"
    batches = [((images(n, size),), {}) for n, size in ((2, 12), (3, 9))]
    quant_model = written(calibrated(model, batches, backend="onnx"), model, batches[0], file)
    assert "SplitToSequence" not in operators(file)
    for batch in (2, 3, 5):
        for size in (9, 12, 17):
            inputs = ((images(batch, size),), {})
            expected = tensors(quant_model, inputs)
            found = run_onnxruntime(file, feeds(quant_model, inputs))
            assert [x.shape for x in found] == [x.shape for x in expected]
            assert sqnr(expected, found) > 40, (batch, size)


class Interleaved(nn.Module):
    """One row of queries for all windows of an image: as often as the image has windows."""

    def __init__(self, axis: int | None) -> None:
        super().__init__()
        self.axis, self.first, self.last = axis, nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        windows = x.reshape(-1, 2, 8)
        times = windows.shape[0] // query.shape[0]
        if self.axis is None:
            return self.last(self.first(query).repeat_interleave(times).reshape(-1, 8))
        query = self.first(query).repeat_interleave(times, self.axis)
        if self.axis:
            return self.last(query)
        return self.last(query + windows)


@pytest.mark.parametrize("axis", [0, 1, rarely(None)])
def test_every_number_of_repeats(axis: int | None, tmp_path: Path) -> None:
    """Rows as many as they are repeated, one row, and others."""
    model, file = seeded(lambda: Interleaved(axis)), tmp_path / "m.onnx"

    def given(batch: int, tokens: int) -> Any:
        return (normal(batch, tokens, 8), normal(batch, 2, 8, salt=tokens)), {}

    batches = [given(2, 12), given(3, 8)]
    quant_model = written(calibrated(model, batches, backend="onnx"), model, batches[0], file)
    for batch, tokens in ((2, 12), (2, 4), (1, 6), (4, 8), (3, 10)):
        inputs = given(batch, tokens)
        expected = tensors(quant_model, inputs)
        found = run_onnxruntime(file, feeds(quant_model, inputs))
        assert [x.shape for x in found] == [x.shape for x in expected]
        assert sqnr(expected, found) > 40, (batch, tokens)
