"""Grids that are kept, and sums that read codes."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from models import normal, seeded
from rewriting import Compute, apply, canonical, plan_for
from torch import Tensor, fx, nn

from torch_quant.backends.onnx.forms.keep_grids import keep_grids
from torch_quant.backends.onnx.forms.read_codes import read_codes
from torch_quant.core.plan import QuantPlan
from torch_quant.graph.sites import find_sites
from torch_quant.ops.qdq import DEQUANTIZE, QUANTIZE
from torch_quant.passes.base import Pass, PassContext
from torch_quant.passes.insert_qdq import insert_qdq


class Convs(nn.Module):
    """Two convolutions, put together by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)


class Pooled(Convs):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.max_pool2d(self.a(x).relu(), 2))


class Averaged(Convs):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.avg_pool2d(self.a(x).relu(), 2))


class Residual(Convs):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y.relu()) + y.relu() * 1.0


class Shortcut(Convs):
    def forward(self, x: Tensor) -> Tensor:
        y = x.sigmoid()
        return self.a(y) + y


def quantized(
    model: nn.Module, x: Tensor, rewrite: Pass
) -> tuple[fx.GraphModule, fx.GraphModule, int]:
    """The graph with quantized results, before and after the pass, and its number of changes."""

    def insert() -> fx.GraphModule:
        gm = canonical(model, x)
        outputs = {site.name: site.fused_output for _, _, site in find_sites(gm.graph)}
        plan = QuantPlan(
            replace(s, quantized_output=outputs[s.name]) for s in plan_for(gm).values()
        )
        apply(insert_qdq, gm, plan)
        return gm

    before, after = insert(), insert()
    return before, after, apply(rewrite, after)


def grids(gm: fx.GraphModule) -> list[tuple[object, ...]]:
    return [n.args[1:3] for n in gm.graph.find_nodes(op="call_function", target=QUANTIZE)]


def test_the_result_of_a_convolution_is_read_quantized() -> None:
    model, x = seeded(Pooled), normal(2, 4, 8, 8)
    before, _, _ = quantized(model, x, keep_grids)
    assert len(grids(before)) == 4  # the input, both results, the pool
    relu = next(n for n in before.graph.nodes if "relu" in str(n.target))
    assert [user.target for user in relu.users] == [QUANTIZE]


def test_a_maximum_stays_on_its_grid() -> None:
    model, x = seeded(Pooled), normal(2, 4, 8, 8)
    before, after, count = quantized(model, x, keep_grids)
    assert count == 1
    assert len(set(grids(before))) == 4
    assert len(set(grids(after))) == 3
    pool = next(n for n in after.graph.nodes if "max_pool2d" in str(n.target))
    (quantizer,) = pool.users
    (real,) = quantizer.users
    assert real.target is DEQUANTIZE
    assert real.args[1:] == quantizer.args[1:] == pool.args[0].args[1:]
    assert torch.isfinite(after(x)[0]).all()


def test_an_average_does_not() -> None:
    _, _, count = quantized(seeded(Averaged), normal(2, 4, 8, 8), keep_grids)
    assert count == 0


def test_a_sum_with_a_quantized_operand_reads_codes() -> None:
    model, x = seeded(Shortcut), normal(2, 4, 8, 8)
    before, after, count = quantized(model, x, read_codes)
    assert count == 1
    total = next(n for n in after.graph.nodes if "add" in str(n.target))
    assert [each.target for each in total.all_input_nodes] == [DEQUANTIZE, DEQUANTIZE]
    sigmoid = next(n for n in before.graph.nodes if "sigmoid" in str(n.target))
    assert len(sigmoid.users) == 2
    sigmoid = next(n for n in after.graph.nodes if "sigmoid" in str(n.target))
    assert [user.target for user in sigmoid.users] == [QUANTIZE]


def test_a_sum_without_codes_to_read_stays() -> None:
    _, _, count = quantized(seeded(Residual), normal(2, 4, 8, 8), read_codes)
    assert count == 0
    gm = canonical(Compute(lambda x, y: x + y), normal(2, 4), normal(2, 4))
    assert read_codes(PassContext(gm)) == 0
