"""An LSTM between quantize and dequantize: grids, codes, and what is computed from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import normal
from rewriting import WEIGHT, FixedParams, canonical, context_of, grid_of, plan_for
from torch import Tensor, fx, nn

from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.ops.qdq import DEQUANTIZE, QUANTIZE
from torch_quant.ops.recurrent import LSTM, cells_of
from torch_quant.passes.base import run_passes
from torch_quant.passes.insert_qdq import insert_qdq
from torch_quant.passes.lower_precision import lower_precision


def made(weight: QuantSpec = WEIGHT, **options: Any) -> tuple[nn.LSTM, fx.GraphModule]:
    torch.manual_seed(0)
    model = nn.LSTM(8, 6, **options).eval()
    gm = canonical(model, normal(5, 3, 8))
    context = context_of(gm, plan_for(gm, weight=weight))
    counts = run_passes(context, [insert_qdq])
    assert list(counts.values()) == [1]
    return model, context.gm


def the_lstm(gm: fx.GraphModule) -> fx.Node:
    (node,) = gm.graph.find_nodes(op="call_function", target=LSTM)
    return node


def value_of(node: fx.Node) -> Tensor:
    """The buffer that a node reads."""
    return node.graph.owning_module.get_buffer(node.target)


def test_input_matrices_and_hidden_state_are_quantized() -> None:
    _, gm = made(num_layers=2, bidirectional=True)
    node = the_lstm(gm)
    x, hx, params, has_biases, *_ = node.args
    assert x.target is DEQUANTIZE
    assert x.args[0].target is QUANTIZE
    assert not any(each.target in (QUANTIZE, DEQUANTIZE) for each in hx)
    for w_ih, w_hh, *biases in cells_of(params, has_biases):
        assert (w_ih.target, w_hh.target) == (DEQUANTIZE, DEQUANTIZE)
        assert [each.op for each in biases] == ["get_attr", "get_attr"]
        for matrix in (w_ih, w_hh):
            assert gm.get_buffer(matrix.args[0].target).dtype == torch.int8
    hidden = grid_of("lstm.hidden", QuantSpec())
    *grid, element = node.args[7:]
    assert [each.target for each in grid] == ["lstm.hidden_scale", "lstm.hidden_zero_point"]
    assert [value_of(each) for each in grid] == [hidden.scale, hidden.zero_point]
    assert element == "uint8"


@pytest.mark.parametrize("bidirectional", [False, True])
def test_both_matrices_of_a_cell_share_the_scale_that_kernels_sum_on(bidirectional: bool) -> None:
    """One step of a code of ``W_ih`` times one of ``x`` is one of ``W_hh`` times one of ``h``."""
    model, gm = made(num_layers=2, bidirectional=bidirectional)
    node = the_lstm(gm)
    of_x, of_h = value_of(node.args[0].args[1]), value_of(node.args[7])
    cells = cells_of(node.args[2], True)
    for i, (w_ih, w_hh, *_) in enumerate(cells):
        of_input = of_x if i < len(cells) // 2 else of_h
        steps = [gm.get_buffer(each.args[1].target) for each in (w_ih, w_hh)]
        torch.testing.assert_close(steps[0] * of_input, steps[1] * of_h)
        codes = torch.cat([gm.get_buffer(each.args[0].target) for each in (w_ih, w_hh)], 1)
        assert bool((codes.int().abs().amax(1) >= 127).all())  # the range of a row is used
    weights = [x for name, x in model.named_parameters() if name.startswith("weight")]
    matrices = [each for cell in cells for each in cell[:2]]
    for each, weight in zip(matrices, weights, strict=True):
        step = gm.get_buffer(each.args[1].target)
        real = gm.get_buffer(each.args[0].target) * step
        assert bool(((real - weight).abs() <= 0.51 * step).all())


@torch.no_grad()
def test_it_computes_the_lstm_but_for_rounding() -> None:
    model, gm = made(num_layers=2, bias=False)
    x = normal(7, 2, 8)
    output, (h_n, c_n) = model(x)
    for got, expected in zip(gm(x), (output, h_n, c_n), strict=True):
        step = float(value_of(the_lstm(gm).args[7]))
        assert 0.0 < float((got - expected).abs().max()) < step  # of the hidden state's grid


def test_a_weight_format_with_one_scale() -> None:
    _, gm = made(QuantSpec.of(signed=True, symmetric=True))
    matrices = the_lstm(gm).args[2][:2]
    assert all(each.target is DEQUANTIZE for each in matrices)
    assert all(value_of(each.args[1]).dim() == 0 for each in matrices)


def test_a_module_called_twice_is_two_sites() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(self.lstm(x)[0])[0]

    gm = canonical(Twice().eval(), normal(5, 3, 8))
    context = context_of(gm)
    assert list(context.plan) == ["lstm", "lstm@1"]
    run_passes(context, [insert_qdq])
    assert len(context.graph.find_nodes(op="call_function", target=LSTM)) == 2


@torch.no_grad()
def test_in_bfloat16_every_result_comes_back_as_float32() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(8, 6).eval()
    gm = canonical(model, normal(5, 3, 8))
    plan = plan_for(gm).without(["lstm"], precision="bfloat16")
    context = context_of(gm, plan)
    run_passes(context, [lower_precision])
    x = normal(4, 2, 8)
    output, (h_n, c_n) = model(x)
    for got, expected in zip(context.gm(x), (output, h_n, c_n), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.02)


def test_without_a_grid_for_the_hidden_state_it_is_not_quantized() -> None:
    gm = canonical(nn.LSTM(8, 6).eval(), normal(5, 3, 8))

    class Missing(FixedParams):
        def activation(self, key: str, spec: QuantSpec) -> QParams:
            if key.endswith(".hidden"):
                raise KeyError(key)
            return grid_of(key, spec)

    with pytest.raises(KeyError, match="hidden"):
        insert_qdq(context_of(gm, params=Missing()))
