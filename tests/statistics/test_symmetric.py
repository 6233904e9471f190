"""Sums of which half is computed: wide vectors, and what copies, states and merges see of them."""

from __future__ import annotations

import copy

import pytest
import torch
from models import normal
from torch import Tensor

from torch_quant.core.window import Window
from torch_quant.statistics import Hessian, Patches

POINT = Window((1,), (1,), (0,), (0,), (1,))


def made(kind: str, *batches: Tensor) -> Hessian | Patches:
    found = Hessian() if kind == "vectors" else Patches(POINT)
    for x in batches:
        found.observe(x if kind == "vectors" else x.T[None])
    return found


@pytest.mark.parametrize("size", [256, 257, 700])
@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_all_of_it_is_there_when_it_is_read(kind: str, size: int) -> None:
    x, y = normal(40, size), normal(30, size, salt=1)
    found = made(kind, x, y)
    before = copy.deepcopy(found)
    wanted = x.T @ x + y.T @ y
    torch.testing.assert_close(found.sums.squeeze(0), wanted)
    assert torch.equal(found.sums, found.sums.mT)
    assert torch.equal(before.sums, found.sums)
    found.observe(x if kind == "vectors" else x.T[None])  # after it was read
    torch.testing.assert_close(found.sums.squeeze(0), wanted + x.T @ x)
    torch.testing.assert_close(before.sums.squeeze(0), wanted)
    before.merge(made(kind, x))
    assert torch.equal(before.state_dict()["sums"], before.sums)
    torch.testing.assert_close(before.sums, found.sums)


def test_what_lies_above_the_diagonal_is_no_garbage() -> None:
    """Memory that was not written may hold anything, NaN too."""
    hessian = made("vectors", normal(4, 600))
    hessian._sums[0, 599] = torch.nan
    assert bool(torch.isfinite(hessian.sums).all())


@torch.inference_mode()
def observed_there(x: Tensor) -> Hessian:
    return made("vectors", x)  # type: ignore[return-value]


def test_sums_of_inference_mode_are_read_outside() -> None:
    x = normal(8, 300)
    torch.testing.assert_close(observed_there(x).sums, x.T @ x)
