"""Passes read arguments by name: a call that gives them all by keywords is the same call to them.

``torch.export`` gives by position what has one. Passes of others need not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import normal, seeded, tokens
from rewriting import FixedParams, by_keywords, captured, operators, plan_for
from torch import Tensor, fx, nn

from torch_quant import Backend
from torch_quant.backends.ipex.backend import quantized_tensors
from torch_quant.backends.ipex.bags import look_up_bags
from torch_quant.backends.ipex.forms import graph_forms
from torch_quant.backends.ipex.guards import GUARDS
from torch_quant.core.spec import QuantSpec
from torch_quant.graph.sites import find_sites
from torch_quant.ops.attention import decompose_attention
from torch_quant.passes.base import Pass, PassContext, copy_graph, run_passes
from torch_quant.passes.canonicalize import CANONICAL_PASSES, canonicalize
from torch_quant.passes.dynamic_sizes import dynamic_sizes
from torch_quant.passes.fold_scales import fold_scales
from torch_quant.passes.insert_qdq import insert_qdq


class Images(nn.Module):
    """Convolutions with paddings by name and number, norms, pools, activation functions, a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding="same", dilation=2), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm(self.first(x)))
        y = F.hardtanh(torch.add(self.second(y), y), min_val=-2.0)
        y = F.max_pool2d(F.pad(y, (1, 1, 1, 1)), kernel_size=2)
        y = F.avg_pool2d(F.leaky_relu(self.up(y), 0.2), 2, stride=2)
        y = F.dropout(y.to(torch.float32), 0.5, training=False)
        return self.head(y.flatten(2).transpose(1, 2).contiguous().mean(1))


class Sentences(nn.Module):
    """Embeddings, attention, a norm without weights, products by other names, an in-place sum."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.table, self.mix = nn.Embedding(64, 16, padding_idx=0), nn.Linear(16, 48)
        self.matrix, self.bias = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.layer_norm(self.table(ids), (16,), eps=1e-3)
        heads = self.mix(x).unflatten(-1, (3, 2, 8)).movedim(2, 0).transpose(2, 3)
        query, key, value = heads[0], heads[1][:, :1], heads[2][:, :1]
        mask = None if self.causal else (ids > 3)[:, None, None, :]
        x = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=self.causal, scale=0.4, enable_gqa=True
        )
        x = x.transpose(1, 2).reshape(*ids.shape, 16)
        x = torch.addmm(self.bias, x.flatten(0, 1), self.matrix).relu()
        x += 1.0
        return F.gelu(torch.mm(x, self.matrix), approximate="tanh").softmax(-1)


class Bags(nn.Module):
    """Bags of embeddings, and a recurrent layer over them."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(64, 8, mode="sum")
        self.layer = nn.LSTM(8, 6, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        steps, _ = self.layer(self.bags(ids)[None])
        return steps


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "images": (Images, normal(2, 3, 8, 8)),
    "causal": (lambda: Sentences(causal=True), tokens(2, 6)),
    "masked": (lambda: Sentences(causal=False), tokens(2, 6)),
    "bags": (Bags, tokens(4, 3)),
}
FOR_IPEX: tuple[Pass, ...] = (
    fold_scales, look_up_bags, *graph_forms(int8_shortcuts=True), *GUARDS,
)  # fmt: skip


@cache
def exported(name: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph as it was captured, and the canonical one."""
    make, x = MODELS[name]
    gm = captured(seeded(make).eval(), x)
    return gm, canonicalize(gm)


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def agree(one: fx.GraphModule, other: fx.GraphModule, x: Tensor) -> None:
    assert operators(one) == operators(other)
    for a, b in zip(one(x), other(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def quantized(name: str, backend: Backend) -> PassContext:
    """A graph with pairs, what ``backend`` has no kernel for in float."""
    gm = copy_graph(exported(name)[1])
    weight = Backend.ONEDNN.kernels().rows[0].weight
    assert weight is not None
    known = backend.kernels()
    floats = tuple(
        site.name
        for _, pattern, site in find_sites(gm.graph)
        if known.choose(
            pattern.name,
            QuantSpec() if pattern.activations else None,
            None if pattern.weight is None else weight.default,
        )[0] is None
    )  # fmt: skip
    plan = plan_for(gm, floats=floats, weight=weight.default)
    context = PassContext(gm, plan, FixedParams())
    run_passes(context, [insert_qdq])
    return context


def run(gm: fx.GraphModule, passes: Sequence[Pass], plan: Any = None) -> dict[str, int]:
    context = PassContext(gm, *([] if plan is None else [plan]), FixedParams())
    return run_passes(context, passes)


@pytest.mark.parametrize("rewrite", [*CANONICAL_PASSES, dynamic_sizes], ids=lambda f: f.__name__)
def test_passes_on_captured_graphs(name: str, rewrite: Pass) -> None:
    gm, _ = exported(name)
    plain, named = copy_graph(gm), by_keywords(gm)
    assert run(plain, [rewrite]) == run(named, [rewrite])
    agree(plain, named, MODELS[name][1])


def test_pairs(name: str) -> None:
    _, gm = exported(name)
    plain, named = copy_graph(gm), by_keywords(gm)
    assert run(plain, [insert_qdq], plan_for(gm)) == run(named, [insert_qdq], plan_for(gm))
    agree(plain, named, MODELS[name][1])


@pytest.mark.parametrize("runtime", ["reference", "onednn", "onnx"])
def test_lowering(name: str, runtime: str) -> None:
    backend = Backend.get(runtime)
    if why := backend.unavailable():
        pytest.skip(f"{backend!r}: {why}")
    lowered = []
    for form in (copy_graph, by_keywords):
        context = quantized(name, backend)
        gm = form(context.gm)
        context = PassContext(gm, context.plan, FixedParams())
        run_passes(context, backend.kernels().passes)
        context = PassContext(form(gm), context.plan, FixedParams())
        lowered.append(backend.lower(context))
        run_passes(PassContext(lowered[-1]), [])
    agree(*lowered, MODELS[name][1])


def test_forms_for_a_compiler(name: str) -> None:
    """Without what IPEX alone computes: quantized tensors come last."""
    plain = quantized(name, Backend.ONNX).gm
    named = by_keywords(plain)
    for rewrite in FOR_IPEX:
        named = by_keywords(named)
        assert run(plain, [rewrite]) == run(named, [rewrite]), rewrite
    agree(plain, named, MODELS[name][1])
    assert run(plain, [quantized_tensors]) == run(by_keywords(named), [quantized_tensors]) != {}


def test_a_keyword_for_an_argument_with_a_position() -> None:
    """The attention's scale and mask have to be seen; with others, the product would be another."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = normal(1, 2, 4, 8)
    call = graph.call_function(
        torch.ops.aten.scaled_dot_product_attention.default,
        (x,),
        {"key": x, "value": x, "is_causal": True, "scale": 0.5},
    )
    graph.output((call,))
    call.meta.update(val=x.meta["val"], torch_quant_key="call")
    gm = fx.GraphModule(nn.Module(), graph)
    value = normal(1, 2, 4, 8)
    wanted = gm(value)[0]
    decompose_attention(call)
    gm.recompile()
    torch.testing.assert_close(gm(value)[0], wanted, rtol=1e-5, atol=1e-6)
