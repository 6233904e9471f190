"""Second moments: what they sum, and that they hold in every way a statistic travels."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from torch_quant import InvalidConfig, QuantError
from torch_quant.statistics import HESSIAN, MEAN_SQUARE, STATISTICS, Hessian, MeanSquare

KINDS = [Hessian, MeanSquare]


def data(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(seed))


def test_the_hessian_is_the_mean_of_products() -> None:
    hessian = Hessian()
    for x in data():
        hessian.observe(x)
    rows = data().reshape(-1, 7).double()
    # Sums of 30 products in float32.
    torch.testing.assert_close(hessian.mean.double(), rows.T @ rows / 30, rtol=1e-5, atol=1e-6)
    assert hessian.rows == 30
    assert hessian.batches == 6


def test_mean_squares_are_its_diagonal() -> None:
    hessian, squares = Hessian(), MeanSquare()
    for each in (hessian, squares):
        each.observe(data())
    torch.testing.assert_close(squares.mean, hessian.mean.diagonal())


@pytest.mark.parametrize("kind", KINDS)
def test_parts_merge_to_the_whole(kind: type[Hessian | MeanSquare]) -> None:
    whole, parts = kind(), kind()
    whole.observe(data())
    for x in data().split(4):
        part = kind()
        part.observe(x)
        parts.merge(part)
    torch.testing.assert_close(parts.mean, whole.mean)  # sums in another order
    assert parts.rows == whole.rows
    assert parts.batches == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_saved_and_loaded(kind: type[Hessian | MeanSquare]) -> None:
    seen, file = kind(), io.BytesIO()
    seen.observe(data())
    torch.save(seen.state_dict(), file)
    file.seek(0)
    for state in (torch.load(file, weights_only=True), kind().state_dict()):
        loaded = kind()
        loaded.load_state_dict(state)
        assert loaded.state_dict().keys() == state.keys()
        assert torch.equal(loaded.sums, state["sums"])
        assert (loaded.rows, loaded.batches) == (state["rows"], state["batches"])


@pytest.mark.parametrize("kind", KINDS)
def test_copies_do_not_learn_what_the_original_learns(kind: type[Hessian | MeanSquare]) -> None:
    seen = kind()
    seen.observe(data())
    copied, before = copy.deepcopy(seen), seen.mean.clone()
    seen.observe(data(1))
    assert torch.equal(copied.mean, before)
    assert not torch.equal(seen.mean, before)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_summed_changes_nothing(kind: type[Hessian | MeanSquare]) -> None:
    seen = kind()
    seen.observe(data())
    before = seen.mean.clone()
    for wrong, message in (
        (torch.tensor([[float("nan")] * 7]), "NaN"),
        (torch.tensor([[float("inf")] * 7]), "Inf"),
        (torch.ones(2, 5), "5 channels after such of 7"),
        (torch.ones(2, 7, dtype=torch.int64), "expected a float tensor"),
        (torch.ones(0, 7), "empty"),
    ):
        with pytest.raises(QuantError, match=message):
            seen.observe(wrong)
    assert torch.equal(seen.mean, before)
    assert seen.rows == 30


def test_sums_too_large_for_float32() -> None:
    """A method that needs them refuses; where they are only wanted, the largest number stands."""
    large = torch.full((1, 7), 1e30)
    with pytest.raises(QuantError, match="too large for float32"):
        Hessian().observe(large)
    seen = MeanSquare()
    seen.observe(large)
    assert torch.equal(seen.mean, torch.full((7,), torch.finfo(torch.float32).max))


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_state_is_refused(kind: type[Hessian | MeanSquare]) -> None:
    seen, other = kind(), kind()
    seen.observe(data())
    other.observe(torch.ones(2, 3))
    good = seen.state_dict()
    for entry, value, message in (
        ("sums", torch.ones(2, 3), "expected \\[channels"),
        ("sums", good["sums"].double(), "torch.float64"),
        ("sums", good["sums"] * float("inf"), "not finite"),
        ("rows", 0, "'rows' is 0 and 'batches' 1"),
        ("rows", -1, "0 or more"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            kind().load_state_dict({**good, entry: value})
    with pytest.raises(InvalidConfig, match="of 7 and 3 channels"):
        seen.merge(other)


def test_both_are_registered() -> None:
    assert STATISTICS[HESSIAN] is Hessian
    assert STATISTICS[MEAN_SQUARE] is MeanSquare
