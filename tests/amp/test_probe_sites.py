"""Single sites cut out of the canonical graph compute what the captured graph computes there."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD
from flows import equal
from models import MODELS, example, normal, seeded, tokens
from thinning import rarely, third
from torch import Tensor, fx, nn
from zoo import ZOO

from torch_quant.amp.probe_sites import LocalSite, cut_sites, insert_site_probes, insulated
from torch_quant.graph.calls import flatten_call
from torch_quant.graph.export import export_graph
from torch_quant.graph.sites import KEY
from torch_quant.graph.twin import twin_of
from torch_quant.nn.probe import SiteProbe
from torch_quant.passes.prepare import Prepared, prepare

Made = tuple[nn.Module, Prepared, tuple[Tensor, ...]]


class MatrixBias(nn.Module):
    """``addmm`` whose bias is a matrix: more than a linear layer in one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(16, 8)),
            nn.Parameter(torch.randn(1, 8).T),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x[:, :8], x, self.weight) * self.bias[0]


class Attention(nn.Module):
    """Fewer heads of keys and values than of queries, if asked for; masked."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, heads = kind, 2 if kind == "grouped" else 4
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 4 * heads)
        self.value = nn.Linear(16, 4 * heads)
        if kind == "constant mask":
            self.register_buffer("mask", torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (-1, 4)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        mask: Tensor | None = None
        if self.kind == "float mask":
            mask = x[:, None, :, :1] - x[:, None, :, 1:2].transpose(-1, -2)
        elif self.kind == "bool mask":
            mask = x[:, None, :, :6] > -1.0
        elif self.kind == "constant mask":
            mask = self.mask
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=self.kind == "grouped"
        )


class ConstantOperand(nn.Module):
    """A product of activations, one of which is computed from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.project = nn.Parameter(torch.randn(1, 2, 6, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.project(self.places).relu()
        return x.unflatten(-1, (2, 8)).transpose(1, 2) @ keys.transpose(-1, -2)


OWN: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "conv_bn": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        lambda: (normal(2, 3, 6, 6),),
    ),
    "matrix_bias": (MatrixBias, lambda: (normal(4, 16),)),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 8)),
        lambda: (tokens(2),),
    ),
    "constant_operand": (ConstantOperand, lambda: (normal(2, 6, 16),)),
    **{
        f"attention, {kind}": (lambda kind=kind: Attention(kind), lambda: (normal(2, 6, 16),))
        for kind in ("causal", "float mask", "bool mask", "constant mask", "grouped")
    },
}
OTHERS = [
    *MODELS,
    *("scaled_weight", "matrix_products", "batched_products", "standardized_conv", "convs_1d"),
    *("convs_2d", "linear_batch_norms", "reused_linear", "in_place", "dynamic_weight"),
]


def make(name: str) -> Made:
    if name in OWN:
        build, inputs = OWN[name]
        model, args, kwargs = seeded(build), inputs(), {}
    elif name in ZOO:
        model, args, kwargs = ZOO[name].build(), (), ZOO[name].inputs(2)
    elif name in MODELS:
        model, args, kwargs = MODELS[name](), example(name, 2), {}
    else:
        model = AWKWARD[name].build()
        args, kwargs = AWKWARD[name].inputs(2)
    call = flatten_call(args, kwargs)
    return model, prepare(export_graph(twin_of(model), call).gm), call.tensors


def clean(prepared: Prepared) -> list[LocalSite]:
    """All sites but those that read what is written to in place."""
    return cut_sites(prepared, {site.name for site, reason in prepared.sites if not reason})


class Recording(fx.Interpreter):
    """Copies of what sites read and give, at the moment they run."""

    def __init__(self, gm: fx.GraphModule, sites: list[LocalSite]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.sites, self.seen = sites, {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        for local in self.sites:
            if local.result == node.name:
                values = {n.name: value for n, value in self.env.items()}
                args = [values[name].clone() for name in local.arguments]
                self.seen[local.site.name] = (args, result.clone())
        return result


@pytest.mark.parametrize("name", [*OWN, *third(OTHERS, 0), rarely("deberta_v2")])
def test_a_site_alone_gives_the_tensor_of_the_captured_graph(name: str) -> None:
    _, prepared, tensors = make(name)
    sites = clean(prepared)
    assert sites
    recording = Recording(prepared.captured, sites)
    recording.run(*tensors)
    assert set(recording.seen) == {local.site.name for local in sites}
    for local in sites:
        args, expected = recording.seen[local.site.name]
        found = local.gm(*args)
        if name == "matrix_bias":
            continue  # the site is less than the operator: see below
        # Folded batch norms and products as linear layers round in another order.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_bias_that_is_a_matrix_is_not_part_of_the_site() -> None:
    model, prepared, (x,) = make("matrix_bias")
    (local,) = clean(prepared)
    recording = Recording(prepared.captured, [local])
    recording.run(x)
    args, result = recording.seen[local.site.name]
    product = x @ model.weight
    torch.testing.assert_close(local.gm(*args), product)  # summed in another order
    torch.testing.assert_close(result, product + x[:, :8])
    probe = SiteProbe("", local.gm, local.gm, None, 0, lambda probe, y, args: y)
    assert torch.equal(probe.reference(result, tuple(args)), local.gm(*args))
    assert probe.reference(product, tuple(args)) is not product  # decided once


def test_a_site_that_is_the_whole_operator_is_compared_with_its_result() -> None:
    _, prepared, tensors = make("conv_bn")
    sites = clean(prepared)
    recording = Recording(prepared.captured, sites)
    recording.run(*tensors)
    for local in sites:
        args, result = recording.seen[local.site.name]
        probe = SiteProbe("", local.gm, local.gm, None, 0, lambda probe, y, args: y)
        assert probe.reference(result, tuple(args)) is result


@pytest.mark.parametrize("name", [*OWN, "tiny_transformer", "batched_products"])
def test_what_a_site_takes(name: str) -> None:
    """Only what is not constant, under the keys that its grids are found by."""
    _, prepared, _ = make(name)
    for local in clean(prepared):
        inputs = local.gm.graph.find_nodes(op="placeholder")
        assert len(inputs) == len(local.arguments)
        keys = [node.meta[KEY] for node in inputs]
        if local.operand is not None:
            assert local.site.inputs == (keys[local.operand],)
        nodes = {node.name for node in prepared.captured.graph.nodes}
        assert {local.result, *local.arguments} <= nodes


@pytest.mark.parametrize(
    ("name", "site", "count", "operand"),
    [
        ("conv_bn", "0", 1, 0),
        ("embedding", "0", 1, None),  # ids are not quantized
        ("attention, causal", "scaled_dot_product_attention", 3, None),
        ("attention, float mask", "scaled_dot_product_attention", 4, None),
        ("constant_operand", "matmul", 1, None),
    ],
)
def test_arguments_of_a_site(name: str, site: str, count: int, operand: int | None) -> None:
    _, prepared, _ = make(name)
    (local,) = cut_sites(prepared, {site})
    assert len(local.arguments) == count
    assert local.operand == operand


def test_only_the_sites_that_are_asked_for() -> None:
    _, prepared, _ = make("mlp")
    assert [local.site.name for local in cut_sites(prepared, {"4", "0", "absent"})] == ["0", "4"]
    assert cut_sites(prepared, set()) == []


@pytest.mark.parametrize("name", ["conv_bn", "matrix_products", "tiny_transformer", "in_place"])
def test_probes_change_nothing_and_see_everything(name: str) -> None:
    _, prepared, tensors = make(name)
    nodes = [node.format_node() for node in prepared.captured.graph.nodes]
    sites = clean(prepared)
    seen: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}

    class Seen(nn.Module):
        def __init__(self, local: LocalSite) -> None:
            super().__init__()
            self.name = local.site.name

        def forward(self, y: Tensor, *args: Tensor) -> Tensor:
            seen[self.name] = (y.clone(), tuple(x.clone() for x in args))
            return y

    gm = insert_site_probes(prepared, sites, Seen)
    copies = [tuple(x.clone() for x in tensors) for _ in range(2)]
    outputs, expected = gm(*copies[0]), prepared.captured(*copies[1])
    for x, y in zip(outputs, expected, strict=True):
        assert equal(x, y)
    recording = Recording(prepared.captured, sites)
    recording.run(*tensors)
    assert set(seen) == set(recording.seen)
    for site, (args, result) in recording.seen.items():
        assert equal(seen[site][0], result)
        assert all(map(equal, seen[site][1], args))
    assert [node.format_node() for node in prepared.captured.graph.nodes] == nodes


def test_what_a_probe_returns_is_what_goes_on() -> None:
    model, prepared, (x,) = make("mlp")

    class Zero(nn.Module):
        def __init__(self, local: LocalSite) -> None:
            super().__init__()

        def forward(self, y: Tensor, *args: Tensor) -> Tensor:
            return torch.zeros_like(y)

    gm = insert_site_probes(prepared, cut_sites(prepared, {"2"}), Zero)
    expected = model[3:](torch.zeros(2, 32))
    assert torch.equal(gm(x)[0], expected)


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("total", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.total.add_(y.mean(0))
        return y + self.total


def test_an_insulated_graph_shares_storage_and_no_history() -> None:
    model, x = seeded(Writes), normal(4, 16)
    gm = export_graph(twin_of(model), flatten_call((x,), {})).gm
    apart = insulated(gm)
    parameters = {id(p) for p in model.parameters()}
    for node in apart.graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(node.target)(apart)
        original = operator.attrgetter(node.target)(gm)
        assert value.data_ptr() == original.data_ptr()
        assert (value is original) == (id(value) in parameters)
    before = model.total.clone()
    with torch.enable_grad():
        (outputs,) = apart(x)
    assert outputs.requires_grad
    assert not torch.equal(model.total, before)  # written to as by the model
    assert not model.total.requires_grad
    assert model.total.grad_fn is None
