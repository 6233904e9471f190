"""Which sites fall back together, and that reports say so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flows import CASES, calibrated, run
from models import MODELS, example, normal, seeded
from torch import Tensor, nn

from torch_quant import Quantizer
from torch_quant.amp.proxy import AmpModel
from torch_quant.amp.report import SensitivityReport
from torch_quant.backends import ReferenceBackend
from torch_quant.core.kernels import KernelTable


class Sharing(ReferenceBackend):
    """Wants what shares ``together`` in one precision."""

    def __init__(self, together: frozenset[str]) -> None:
        super().__init__()
        self._together = together

    def _kernels(self) -> KernelTable:
        return replace(super()._kernels(), share_precision=self._together)


def analysed(
    model: nn.Module, *batches: tuple[Any, ...], together: set[str] | None = None
) -> tuple[Quantizer, AmpModel, SensitivityReport]:
    backend = ReferenceBackend() if together is None else Sharing(frozenset(together))
    quantizer = calibrated(model, [(batch, {}) for batch in batches], backend=backend)
    amp_model = quantizer.amp(model)
    for batch in batches:
        run(amp_model, (batch, {}))
    return quantizer, amp_model, quantizer.sensitivity(amp_model)


def of_case(name: str, **options: Any) -> tuple[Quantizer, AmpModel, SensitivityReport]:
    case = CASES[name]
    return analysed(case.build(), case.inputs(4)[0], **options)


def groups(ranking: SensitivityReport) -> set[frozenset[str]]:
    return {frozenset(names) for names in ranking.groups}


def sets(*names: str) -> set[frozenset[str]]:
    return {frozenset(each.split()) for each in names}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reused_linear", sets("l0 l0@1 l0@2")),
        ("listed_twice", sets("l0 l0@1", "l1")),
        ("tied_embedding", sets("embed head", "mix")),
        (
            "shared_block_loop",
            sets("block.up block.up@1 block.up@2", "block.down block.down@1 block.down@2", "head"),
        ),
        ("nested_output", sets("l0", "l1", "l2")),
    ],
)
def test_sites_that_share_a_weight_go_together(name: str, expected: set[frozenset[str]]) -> None:
    model = CASES[name].build()
    quantizer, amp_model, ranking = analysed(model, CASES[name].inputs(4)[0])
    assert groups(ranking) == expected
    for names in ranking.groups:
        for each in names:
            assert set(ranking.of(each).together) == set(names) - {each}
    worst = ranking.groups[0]
    assert sum(ranking.of(n).score for n in worst) == max(
        sum(ranking.of(n).score for n in names) for names in ranking.groups
    )
    assert quantizer.fallback(amp_model, 1) == list(worst)
    assert {n for n, site in quantizer.plan.items() if not site.quantized} == set(worst)


def test_tied_sites_may_be_split_where_the_backend_allows() -> None:
    _, _, ranking = of_case("tied_embedding", together=set())
    assert groups(ranking) == sets("embed", "head", "mix")


class Computed(nn.Module):
    """Two weights computed from one parameter, and one of another, of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.rand(16, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight * self.scale).tanh()
        return self.other(F.linear(x, self.weight.t() * 0.5)) * self.scale.mean()


def test_weights_computed_from_one_parameter() -> None:
    _, _, ranking = analysed(seeded(Computed), (normal(8, 16),))
    assert groups(ranking) == sets("linear linear_1", "other")


def test_query_key_and_value_go_together_where_the_backend_wants_it() -> None:
    model, x = MODELS["tiny_transformer"](), example("tiny_transformer", 8)
    _, _, apart = analysed(model, x)
    assert all(len(names) == 1 for names in apart.groups)
    quantizer, amp_model, ranking = analysed(model, x, together={"weight", "input"})
    triples = {
        frozenset(f"blocks.{i}.{name}" for name in ("query", "key", "value")) for i in range(2)
    }
    assert {names for names in groups(ranking) if len(names) > 1} == triples
    for names in triples:
        for each in names:
            assert set(ranking.of(each).together) == names - {each}
            assert set(ranking.of(each).shares_input) == names - {each}
    assert len(ranking.groups) == len(ranking) - 4
    assert any(row.get("note", "").startswith("with blocks.") for row in ranking.table())
    before = set(quantizer.fallback(amp_model, len(ranking.groups) - 1))
    assert set(quantizer.plan.quantized) == set(ranking.groups[-1])
    assert before | set(ranking.groups[-1]) == set(ranking.names)


def test_sharing_an_input_is_said_where_it_does_not_tie() -> None:
    _, _, ranking = analysed(MODELS["tiny_transformer"](), example("tiny_transformer", 8))
    assert set(ranking.of("blocks.0.query").shares_input) == {"blocks.0.key", "blocks.0.value"}
    assert ranking.of("blocks.0.query").together == ()
    assert ranking.of("blocks.0.out").shares_input == ()


class Chained(nn.Module):
    """``first`` and ``second`` read one tensor; ``second`` is called again beside ``third``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.third, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = (self.first(x) + self.second(x)).relu()
        return self.head((self.second(y) * self.third(y)).tanh())


@pytest.mark.parametrize(
    ("together", "expected"),
    [
        ({"weight"}, sets("first", "second second@1", "third", "head")),
        ({"input"}, sets("first second", "second@1 third", "head")),
        ({"weight", "input"}, sets("first second second@1 third", "head")),
    ],
    ids=["weight", "input", "both"],
)
def test_what_is_tied_to_the_same_is_tied(
    together: set[str], expected: set[frozenset[str]]
) -> None:
    _, _, ranking = analysed(seeded(Chained), (normal(8, 16),), together=together)
    assert groups(ranking) == expected


def test_gain_is_that_of_the_whole_group() -> None:
    _, amp_model, ranking = of_case("reused_linear")
    whole = amp_model.recorder.gram.noise(ranking.names)
    for site in ranking:
        assert site.gain == pytest.approx(whole)
