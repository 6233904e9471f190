"""The matrix of noise energies: sums that do not depend on how the data come."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_quant.amp.gram import NoiseGram


def draw(*names: str, rows: int = 8, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, dtype=torch.float64, generator=generator) for name in names}


def part(effects: dict[str, Tensor], *rows: int) -> dict[str, Tensor]:
    return {name: p[slice(*rows)] for name, p in effects.items()}


def entry(gram: NoiseGram, one: str, two: str) -> float:
    return float(gram.matrix[gram.index[one], gram.index[two]])


def test_entries_are_products_summed_over_samples() -> None:
    effects = draw("a", "b", "c")
    gram = NoiseGram.of(effects, 8)
    assert gram.draws == 8
    for one, p in effects.items():
        for two, q in effects.items():
            assert entry(gram, one, two) == pytest.approx(float((p * q).sum()))
        assert gram.of_site(one) == pytest.approx(float((p * p).sum()))
    assert gram.of_site("unknown") == 0.0


@pytest.mark.parametrize("at", [1, 3, 7])
def test_a_batch_in_two_parts_gives_the_same(at: int) -> None:
    effects = draw("a", "b", "c")
    whole, split = NoiseGram.of(effects, 8), NoiseGram()
    split.add(NoiseGram.of(part(effects, at), at))
    split.add(NoiseGram.of(part(effects, at, 8), 8 - at))
    assert split.index == whole.index
    assert split.draws == whole.draws
    torch.testing.assert_close(split.matrix, whole.matrix)  # sums in another order
    torch.testing.assert_close(split.shrunk(), whole.shrunk())
    assert split.noise("abc") == pytest.approx(whole.noise("abc"))


def test_sites_may_differ_from_batch_to_batch() -> None:
    first, second = draw("a", "b", seed=1), draw("c", "b", seed=2)
    gram = NoiseGram()
    gram.add(NoiseGram.of(first, 8))
    gram.add(NoiseGram.of(second, 8))
    gram.add(NoiseGram())
    assert set(gram.index) == {"a", "b", "c"}
    assert gram.draws == 16
    assert entry(gram, "a", "b") == entry(gram, "b", "a")
    assert entry(gram, "a", "b") == pytest.approx(float((first["a"] * first["b"]).sum()))
    assert entry(gram, "c", "b") == pytest.approx(float((second["c"] * second["b"]).sum()))
    assert entry(gram, "a", "c") == 0.0
    both = first["b"].square().sum() + second["b"].square().sum()
    assert gram.of_site("b") == pytest.approx(float(both))


def test_the_order_of_batches_does_not_matter() -> None:
    grams = [NoiseGram.of(draw(*names, seed=i), 8) for i, names in enumerate(("ab", "bc", "ca"))]
    forth, back = NoiseGram(), NoiseGram()
    for gram in grams:
        forth.add(gram)
    for gram in reversed(grams):
        back.add(gram)
    for one in "abc":
        for two in "abc":
            assert entry(forth, one, two) == pytest.approx(entry(back, one, two))
    assert forth.noise("ac") == pytest.approx(back.noise("ac"))


def test_samples_that_cannot_be_told_apart() -> None:
    """Where only the sum over a batch is known, it is one draw of the batch's energy."""
    effects = draw("a", "b")
    sums = {name: p.sum()[None] for name, p in effects.items()}
    mixed = NoiseGram.of({"a": sums["a"], "b": effects["b"]}, 8)
    assert mixed.draws == 8
    assert mixed.of_site("a") == pytest.approx(float(sums["a"].square()))
    assert mixed.of_site("b") == pytest.approx(float(effects["b"].square().sum()))
    assert entry(mixed, "a", "b") == pytest.approx(float(sums["a"] * effects["b"].sum()))
    both = NoiseGram.of(sums, 8)
    assert entry(both, "a", "b") == pytest.approx(float(sums["a"] * sums["b"]))


def test_a_batch_of_one_sample() -> None:
    effects = draw("a", "b", rows=1)
    gram = NoiseGram.of(effects, 1)
    assert entry(gram, "a", "b") == pytest.approx(float(effects["a"] * effects["b"]))


def test_random_signs_make_sums_an_estimate_of_the_energy() -> None:
    """The mean over signs of both forms, by rows and as a whole, is the sum of squares."""
    signs = 2.0 * torch.randint(0, 2, (4000, 8), generator=torch.Generator().manual_seed(0)) - 1.0
    p = draw("a")["a"]
    whole = torch.tensor(
        [NoiseGram.of({"a": (sign * p).sum()[None]}, 8).of_site("a") for sign in signs]
    )
    energy = float(p.square().sum())
    # A standard error of at most sqrt(2 / 4000) = 2.2 %; four of them.
    assert float(whole.mean()) == pytest.approx(energy, rel=0.09)
    assert NoiseGram.of({"a": p}, 8).of_site("a") == pytest.approx(energy)


def correlated(rows: int, sites: int = 6, *, share: float) -> NoiseGram:
    """Sites whose noises have ``share`` of their energy in common."""
    effects = draw(*map(str, range(sites)), "common", rows=rows)
    common = effects.pop("common")
    return NoiseGram.of(
        {n: share**0.5 * common + (1.0 - share) ** 0.5 * p for n, p in effects.items()}, rows
    )


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_shrinking_is_symmetric_and_leaves_the_diagonal(rows: int, share: float) -> None:
    gram = correlated(rows, share=share)
    shrunk, matrix = gram.shrunk(), gram.matrix
    assert torch.equal(shrunk.diagonal(), matrix.diagonal())
    torch.testing.assert_close(shrunk, shrunk.T)  # a product may round its halves differently
    assert bool((shrunk.abs() <= matrix.abs()).all())
    assert bool((shrunk * matrix >= 0.0).all())


def test_shrinking_tells_chance_from_correlation() -> None:
    def kept(gram: NoiseGram) -> float:
        off = ~torch.eye(len(gram.matrix), dtype=torch.bool)
        return float(gram.shrunk()[off].abs().sum() / gram.matrix[off].abs().sum())

    assert kept(correlated(64, share=0.0)) < 0.4  # independent: what is there is chance
    assert kept(correlated(64, share=0.9)) > 0.9
    assert kept(correlated(4096, share=0.3)) > 0.95


def test_noise_of_some_sites_together() -> None:
    gram = correlated(256, share=0.5)
    shrunk = gram.shrunk()
    assert gram.noise([]) == 0.0
    assert gram.noise(["unknown"]) == 0.0
    assert gram.noise(["2"]) == pytest.approx(gram.of_site("2"))
    assert gram.noise(["0", "3"]) == pytest.approx(
        float(shrunk[0, 0] + shrunk[3, 3] + 2.0 * shrunk[0, 3])
    )
    assert gram.noise(gram.index) == pytest.approx(float(shrunk.sum()))
    assert gram.noise(gram.index) > float(shrunk.diagonal().sum())  # they add up


def test_noises_that_cancel_leave_something() -> None:
    p = draw("a", rows=64)["a"]
    gram = NoiseGram.of({"a": p, "b": -p}, 64)
    assert 0.0 < gram.noise("ab") < gram.of_site("a")


def test_nothing_recorded() -> None:
    gram = NoiseGram()
    assert gram.noise("ab") == 0.0
    assert gram.of_site("a") == 0.0
    assert gram.shrunk().shape == (0, 0)
