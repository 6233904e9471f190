"""Captures that would take minutes over symbolic sizes step down to fewer free ones."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import sympy
import torch
import torch.nn.functional as F
from capturing import capture, executor
from models import images, normal, seeded
from sympy.core.basic import Basic
from torch import Tensor, nn

from torch_quant.graph import budget
from torch_quant.graph.budget import Freedom, OutOfBudget, limited
from torch_quant.graph.calls import flatten_call
from torch_quant.graph.shapes import ShapeContract


class Windows(nn.Module):
    """Attention in windows of an image that is padded to hold whole ones, and then halved."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.down = nn.Linear(8, 24), nn.Conv2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        y = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, -width % 3, 0, -height % 3))
        rows, columns = y.shape[1] // 3, y.shape[2] // 3
        y = y.view(batch, rows, 3, columns, 3, channels).transpose(2, 3).reshape(-1, 9, channels)
        y = F.scaled_dot_product_attention(*self.qkv(y).chunk(3, -1))
        y = y.view(batch, rows, columns, 3, 3, channels).transpose(2, 3)
        y = y.reshape(batch, 3 * rows, 3 * columns, channels)[:, :height, :width]
        x = x + y.permute(0, 3, 1, 2)
        return self.down(F.pad(x, (0, -width % 2, 0, -height % 2)))


def hierarchical() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), Windows(), Windows(), Windows()).eval()


@torch.no_grad()
def test_fewer_sizes_stay_free_where_all_take_too_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(budget, "SECONDS", 0.05)
    monkeypatch.setitem(budget._SHARES, "the batch size", 4000.0)
    model = seeded(hierarchical)
    run, submodule = executor(model)
    with caplog.at_level(logging.WARNING, logger="torch_quant"):
        assert torch.equal(run(images(2, 20)), model(images(2, 20)))
    (record,) = caplog.records
    assert "every size" in record.message
    assert "x.shape[2] = 20" in record.message or "input.shape[2] = 20" in record.message
    assert torch.equal(run(images(5, 20)), model(images(5, 20)))
    assert len(submodule.graphs) == 1
    assert torch.equal(run(images(2, 14)), model(images(2, 14)))
    assert all(graph.reduced for _, graph in submodule.graphs)


def test_nothing_is_left_behind_when_time_is_up() -> None:
    original = Basic.__new__

    def endless() -> None:
        x = sympy.Symbol("x")
        while True:
            x = x + sympy.Symbol(f"y{time.monotonic()}")

    with pytest.raises(OutOfBudget), limited(0.05):
        endless()
    assert Basic.__new__ is original
    with limited(1000):
        assert sympy.Symbol("a") + 1 == 1 + sympy.Symbol("a")


def test_other_threads_are_not_stopped() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for i in range(300):
                sympy.Symbol("a") * i + sympy.Symbol("b")
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    with limited(0):
        thread.start()
        thread.join()
    assert not failures


def test_a_capture_within_its_time_is_not_reduced() -> None:
    assert not capture(seeded(lambda: nn.Linear(8, 8)), normal(2, 8)).reduced


def axes_tried(call_size: int, known: int, reduced: bool) -> list[list[set[int]]]:
    """The free axes of every attempt where none succeeds."""
    contract = ShapeContract(["x"], [("s0", 3, known, known)])
    call = flatten_call((torch.zeros(2, 3, call_size, 8),), {})
    tried: list[list[set[int]]] = []

    def export(axes: list[set[int]]) -> None:
        tried.append(axes)
        raise OutOfBudget

    with pytest.raises(budget.CaptureFailed, match="too long"):
        Freedom(call, [contract], reduced).attempt(export)
    return tried


def test_sizes_that_varied_stay_free_longer() -> None:
    assert axes_tried(16, 8, False) == [[{0, 1, 2, 3}], [{0, 2}], [{0}]]
    assert axes_tried(16, 8, True) == [[{0, 2}], [{0}]]
    assert axes_tried(8, 8, False) == [[{0, 1, 2, 3}], [{0}]]
