"""The moments of an image's patches: those of what a convolution multiplies by its weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import normal
from torch import Tensor

from torch_quant import InvalidConfig, QuantError
from torch_quant.core.window import Window
from torch_quant.statistics import Patches, patches, statistic_class

WINDOWS = {
    "1d": Window((3,), (2,), (1,), (1,), (1,)),
    "2d": Window((3, 2), (1, 2), (1, 0), (0, 1), (1, 2)),
    "groups": Window((2, 3), (1, 1), (0, 1), (0, 1), (1, 1), 3),
    "depthwise": Window((3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 6),
    "point": Window((1, 1), (1, 1), (0, 0), (0, 0), (1, 1)),
    "3d": Window((2, 1, 3), (1, 2, 1), (0, 0, 1), (0, 1, 1), (1, 1, 1), 2),
}
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def image(window: Window, count: int = 2) -> Tensor:
    return normal(count, 6, *(4, 4, 3)[: len(window.kernel)])


def observed(window: Window, *batches: Tensor) -> Patches:
    found = Patches(window)
    for each in batches:
        found.observe(each)
    return found


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_the_energy_of_a_convolution(window: Window) -> None:
    """``w H w^T`` is the mean square of what a convolution by ``w`` gives."""
    x, dims = image(window), len(window.kernel)
    weight = normal(12, 6 // window.groups, *window.kernel, salt=1)
    sides = zip(window.before, window.after, strict=True)
    padded = F.pad(x, [side for pair in reversed(list(sides)) for side in pair])
    y = CONVOLUTIONS[dims](padded, weight, None, window.stride, 0, window.dilation, window.groups)
    assert y.shape[2:] == window.places(x.shape[2:])
    energy = y.transpose(0, 1).flatten(1).square().mean(1)
    rows = weight.reshape(window.groups, -1, observed(window, x).sums.shape[1])
    found = torch.einsum("goi,gij,goj->go", rows, observed(window, x).mean, rows).flatten()
    torch.testing.assert_close(found, energy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_batches_copies_merges_and_states(window: Window) -> None:
    x = image(window, 6)
    whole, parts = observed(window, x), observed(window, x[:2], x[2:])
    torch.testing.assert_close(whole.mean, parts.mean)
    assert (whole.rows, whole.batches, parts.batches) == (parts.rows, 1, 2)
    merged = observed(window, x[:2])
    before = copy.deepcopy(merged)
    merged.merge(observed(window, x[2:]))
    assert torch.equal(merged.sums, parts.sums)
    assert torch.equal(before.sums, observed(window, x[:2]).sums)
    again = statistic_class("patches")()
    again.load_state_dict(merged.state_dict())
    assert isinstance(again, Patches)
    assert (again.window, again.rows, again.batches) == (window, merged.rows, 2)
    assert torch.equal(again.sums, merged.sums)
    unbatched = observed(window, x[0])
    torch.testing.assert_close(unbatched.mean, observed(window, x[:1]).mean)


def test_of_a_large_image_some_patches_are_taken_the_same_each_time() -> None:
    window = Window((3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    x = normal(1, 64, 48, 48)
    found = observed(window, x)
    assert found.rows == 64 * 9 // 4
    assert observed(Window((1,), (1,), (0,), (0,), (1,)), normal(1, 6, 256)).rows == 64
    assert torch.equal(found.sums, observed(window, x).sums)
    twice = observed(window, torch.cat([x, x]))
    torch.testing.assert_close(twice.mean, found.mean)


def test_names_tell_windows_apart() -> None:
    assert len({patches(each) for each in WINDOWS.values()}) == len(WINDOWS)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(6, 5), "holds no images of 2 dimensions"),
        (torch.ones(1, 5, 4, 4), "whose channels are 3 groups"),
        (torch.full((1, 6, 4, 4), torch.nan), "holds NaN"),
        (torch.full((1, 6, 4, 4), 1e30), "too large for float32"),
        (torch.ones(0, 6, 4, 4), "empty"),
    ],
    ids=["vectors", "channels", "nan", "large", "empty"],
)
def test_what_cannot_be_observed(x: Tensor, message: str) -> None:
    found = observed(WINDOWS["groups"], image(WINDOWS["groups"]))
    before = found.sums
    with pytest.raises(QuantError, match=message):
        found.observe(x)
    assert found.sums is before


def test_other_channels_later_are_refused() -> None:
    found = observed(WINDOWS["2d"], normal(1, 6, 5, 5))
    with pytest.raises(QuantError, match="patches of 24 numbers after such of 36"):
        found.observe(normal(1, 4, 5, 5))
    with pytest.raises(InvalidConfig, match="other windows or channels"):
        found.merge(observed(WINDOWS["2d"], normal(1, 4, 5, 5)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": {}}, "'window' is"),
        ({"window": [3]}, "window"),
        ({"sums": torch.zeros(1, 2, 3)}, r"expected \[groups, n, n\]"),
        ({"sums": torch.zeros(2, 36, 36)}, r"expected \[groups, n, n\]"),
        ({"sums": torch.full((1, 36, 36), torch.inf)}, "not finite"),
        ({"rows": 0}, "'rows' is 0"),
    ],
)
def test_states_with_mistakes(change: dict[str, Any], message: str) -> None:
    state = observed(WINDOWS["2d"], image(WINDOWS["2d"])).state_dict()
    fresh = Patches()
    with pytest.raises(InvalidConfig, match=message):
        fresh.load_state_dict(state | change)
    assert fresh.batches == 0


@pytest.mark.parametrize(
    "entry",
    [("kernel", []), ("stride", [0, 1]), ("before", [-1, 0]), ("groups", 0), ("dilation", [1])],
)
def test_windows_with_mistakes(entry: tuple[str, Any]) -> None:
    state = observed(WINDOWS["2d"], image(WINDOWS["2d"])).state_dict()
    window = dict(state["window"]) | dict([entry])
    with pytest.raises(InvalidConfig, match="'window' is"):
        Patches().load_state_dict(state | {"window": window})
