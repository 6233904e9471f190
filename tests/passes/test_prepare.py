from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD
from capturing_once import exported
from models import MODELS, example, normal, seeded
from rewriting import Two, context_of, plan_for
from thinning import third
from torch import Tensor, nn

from torch_quant import Quantizer, sqnr
from torch_quant.graph.calls import flatten_call
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.twin import twin_of
from torch_quant.ops.attention import sdpa_probabilities
from torch_quant.passes.base import run_passes
from torch_quant.passes.insert_qdq import insert_qdq
from torch_quant.passes.prepare import Prepared, insert_observers, prepare

EXPORTED = [*MODELS, *third([e.name for e in AWKWARD.values() if e.exports], 0)]


def build(name: str) -> nn.Module:
    return MODELS[name]() if name in MODELS else AWKWARD[name].build()


def inputs(name: str, batch: int) -> tuple[Tensor, ...]:
    args, kwargs = (example(name, batch), {}) if name in MODELS else AWKWARD[name].inputs(batch)
    return flatten_call(args, kwargs).tensors


def prepared(name: str) -> Prepared:
    args, kwargs = (example(name, 2), {}) if name in MODELS else AWKWARD[name].inputs(2)
    return prepare(graph_of(build(name), *args, **kwargs).gm)


def graph_of(model: nn.Module, *args: Any, **kwargs: Any) -> CapturedGraph:
    return exported(twin_of(model), flatten_call(args, kwargs))


def observed(made: Prepared, *tensors: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """The outputs with observers, and what each of them saw, copied at that moment."""
    seen: dict[str, Tensor] = {}

    def record(key: str, x: Tensor) -> None:
        assert key not in seen, "each tensor is observed once a call"
        seen[key] = x.clone()

    return insert_observers(made, lambda key: partial(record, key))(*tensors), seen


@pytest.mark.parametrize("name", EXPORTED)
def test_outputs_are_bit_identical_and_every_key_is_observed(name: str) -> None:
    made = prepared(name)
    for batch in (2, 3):
        expected = made.captured(*inputs(name, batch))
        outputs, seen = observed(made, *inputs(name, batch))
        for x, y in zip(outputs, expected, strict=True):
            assert torch.equal(x, y) if isinstance(x, Tensor) else x == y
        wanted = {key for site, _ in made.sites for key in site.keys}
        assert set(seen) == set(made.observed) == wanted
        assert all(x.is_floating_point() for x in seen.values())


class FilledLater(nn.Module):
    """Attention over keys whose memory is asked for first and written in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.query = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        part = self.parts(x)
        key = part.new_empty(*part.shape[:-1], 16)
        key[..., :8] = part[..., :8]
        key[..., 8:] = part[..., 8:].cos()
        return F.scaled_dot_product_attention(self.query(x), key, part)


def test_memory_that_nobody_has_written_to_yet_is_no_range() -> None:
    model = seeded(FilledLater)
    torch.use_deterministic_algorithms(True)  # new memory holds NaN
    try:
        quantizer = Quantizer("reference")
        calib_model = quantizer.calib(model)
        for batch in (2, 3):
            x = normal(batch, 5, 16)
            assert torch.equal(calib_model(x), model(x))
        assert sqnr(model(x), quantizer.quantize(model)(x)) > 25
    finally:
        torch.use_deterministic_algorithms(False)
    assert "new_empty" not in quantizer.state.statistics


def test_the_graphs_stay_as_they_were() -> None:
    made = prepared("small_cnn")
    nodes = [node.name for node in made.captured.graph.nodes]
    insert_observers(made, lambda key: lambda x: None)
    insert_observers(made, lambda key: lambda x: None)
    assert [node.name for node in made.captured.graph.nodes] == nodes


def test_what_is_seen_at_a_layer() -> None:
    model = seeded(Two)
    x = normal(3, 16)
    _, seen = observed(prepare(graph_of(model, x).gm), x)
    first = model.l0(x)
    assert list(seen) == [":args_0", "l0", "relu", "l1"]
    assert torch.equal(seen["l0"], first)
    assert torch.equal(seen[":args_0"], x)
    assert torch.equal(seen["relu"], first.relu())
    assert torch.equal(seen["l1"], model.l1(first.relu()))


def test_behind_a_folded_batch_norm_its_output_is_seen() -> None:
    """The folded layer gives what the norm gave, and the captured graph still has the norm."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = normal(2, 3, 6, 6)
    _, seen = observed(prepare(graph_of(model, x).gm), x)
    assert torch.equal(seen["0"], model(x))


def test_the_inside_of_attention_is_seen() -> None:
    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    class Attends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return attend(x)

    x = normal(2, 3, 5, 8)
    _, seen = observed(prepare(graph_of(Attends(), x).gm), x)
    probabilities = seen["scaled_dot_product_attention.probabilities"]
    assert torch.equal(probabilities, sdpa_probabilities(x, x, x, is_causal=True))


class WrittenLater(Two):
    """Each tensor is written to after a site has read it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.l0(x)
        z = self.l1(y)
        y.fill_(1e6)
        x[:, 0] = 1e6
        return z + y


def test_a_later_write_does_not_disturb_what_was_seen() -> None:
    model = seeded(WrittenLater)
    x = normal(3, 16)
    made = prepare(graph_of(model, x).gm)
    _, seen = observed(made, x.clone())
    assert torch.equal(seen[":args_0"], x)
    assert torch.equal(seen["l0"], model.l0(x))
    assert torch.equal(seen["l1"], model.l1(model.l0(x)))


class ReluAfter(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.l0(x)
        return self.l1(torch.relu_(y)) + y


def test_an_activation_in_place_is_seen_with_its_own_values() -> None:
    model = seeded(ReluAfter)
    x = normal(3, 16)
    _, seen = observed(prepare(graph_of(model, x).gm), x)
    values = [key for key in seen if key not in (":args_0", "l0", "l1")]
    assert len(values) == 1
    assert torch.equal(seen[values[0]], model.l0(x).relu())
    assert torch.equal(seen["l0"], model.l0(x))


class WritesBetween(Two):
    """The linear reads what was written after its input was made."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.l0(x)
        y[:, ::2] = 0.0
        return self.l1(y)


class WritesCopy(Two):
    """The linear reads a copy, written to; the original is read elsewhere, as it was."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.l0(x)
        z = y.clone()
        z[:, ::2] = 0.0
        return self.l1(z) + y


class WritesRepeated(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.l0(x).repeat(2, 1)
        y[:1].mul_(-3.0)
        return self.l1(y)


class WritesPart(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.l0(x)
        y.chunk(2, -1)[0].zero_()
        return self.l1(y)


@pytest.mark.parametrize("kind", [WritesBetween, WritesCopy, WritesRepeated, WritesPart])
def test_a_site_reads_what_was_written_to_its_input(kind: Callable[[], Two]) -> None:
    """Integers made where the tensor was made would be stale: such a site is refused, or reads
    integers made later."""
    model = seeded(kind)
    made = prepare(graph_of(model, normal(3, 16)).gm)
    refused = {site.name: reason for site, reason in made.sites if reason}
    context = context_of(made.canonical, plan_for(made.canonical, floats=tuple(refused)))
    run_passes(context, [insert_qdq])
    expected = model(normal(8, 16))
    error = (context.gm(normal(8, 16))[0] - expected).norm() / expected.norm()
    assert float(error) < 0.1


def test_the_reason_names_the_tensor() -> None:
    made = prepare(graph_of(seeded(WritesBetween), normal(3, 16)).gm)
    reasons = {site.name: reason for site, reason in made.sites}
    assert reasons == {"l0": "", "l1": "l0 is written to in place"}


def test_products_that_are_no_sites_have_a_reason() -> None:
    made = prepared("einsums")
    assert not made.sites
    assert made.float_ops
    for op in made.float_ops:
        assert op.name.startswith("einsum")
        assert "write the contraction as matmul" in op.reason


def test_the_prefix_reaches_all_keys() -> None:
    gm = graph_of(MODELS["mlp"](), normal(2, 16)).gm
    made = prepare(gm, "encoder.mlp")
    assert all(key.startswith("encoder.mlp") for key in made.observed)
    assert [site.name for site, _ in made.sites] == [f"encoder.mlp.{i}" for i in (0, 2, 4)]
