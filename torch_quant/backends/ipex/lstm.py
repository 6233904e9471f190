"""LSTMs on IPEX: ``dequantize -> lstm -> quantize`` in the one form that its kernel computes right.

``ipex::quantized_lstm`` reads one grid, that of its input, and takes it for the grid of the hidden
state and of the result too; and it reads the scales of both matrices of a cell as one. Where they
differ it is wrong, without a word. Here they differ in the plan only: the codes of the input are
read as if they were on the grid of the hidden state, for which the scale of ``W_ih`` and the bias
make up:

    W (s_x (q - z_x)) + b  =  W' (s_h (q - z_h)) + b',    W' = W s_x / s_h,
                                                          b' = b + W' s_h (z_h - z_x)

One LSTM in float that IPEX sees in the graph keeps it from fusing any.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.backends.ipex.alone import Alone
from torch_quant.core.kernels import Accepts, Kernel
from torch_quant.core.spec import QuantSpec
from torch_quant.graph.sites import local_name, results
from torch_quant.ops.arguments import argument, part_of, positional, retarget
from torch_quant.ops.functions import graph_function
from torch_quant.ops.qdq import DEQUANTIZE_PER_CHANNEL, DEQUANTIZE_PER_TENSOR
from torch_quant.ops.recurrent import LSTM, projected
from torch_quant.ops.stepping import cells_of
from torch_quant.passes.base import PassContext
from torch_quant.passes.constants import evaluate, new_constant
from torch_quant.passes.fold_scales import number

__all__ = ["LSTM_KERNEL"]

aten = torch.ops.aten


@graph_function
def int8_lstm(
    x: Tensor,
    hx: list[Tensor],
    codes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    options: tuple[int, bool, bool],
    grid_of_x: tuple[float, int],
    grid: tuple[float, int],
    output_is_read: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """An LSTM in the form that IPEX fuses.

    Args:
        x: the input as a quantized tensor; while exporting, rounded to its grid in float.
        hx: initial hidden and cell state.
        codes: int8 ``W_ih`` and ``W_hh`` of each cell.
        scales: of each cell, for both matrices.
        biases: of each cell, the sum of both with what makes up for the zero point.
        options: number of layers, bidirectional, batch first.
        grid_of_x: scale and zero point of ``x``.
        grid: of the hidden states.
        output_is_read: whether the first result is, without which the kernel is not fused.
    """
    layers, bidirectional, batch_first = options
    zeros = [torch.zeros_like(bias) for bias in biases]
    if torch.compiler.is_compiling():
        x = (x / grid_of_x[0] + (grid_of_x[1] - grid[1])) * grid[0]
        real = [q.float() * scales[i // 2][:, None] for i, q in enumerate(codes)]
        params = _joined(real, biases, zeros)
        flags = (True, layers, bidirectional, batch_first)
        of_h = (x.new_full((), grid[0]), x.new_full((), grid[1], dtype=torch.int32))
        outputs: tuple[Tensor, Tensor, Tensor] = LSTM(x, hx, params, *flags, *of_h, "uint8")
        return outputs
    x = torch._make_per_tensor_quantized_tensor(x.int_repr(), *grid).dequantize()
    with torch.autocast("cpu", enabled=False):
        real = [_dequantized(q, scales[i // 2]) for i, q in enumerate(codes)]
        output, h_n, c_n = torch.lstm(
            x, [each.float() for each in hx], _joined(real, biases, zeros),
            True, layers, 0.0, False, bidirectional, batch_first,
        )  # fmt: skip
    output = torch.quantize_per_tensor(output, *grid, torch.quint8).dequantize()
    if not output_is_read:
        h_n = _last_of(output, h_n, bidirectional, batch_first)
    return output, h_n, c_n


@graph_function
def float_lstm(*args: Any) -> Any:
    """``aten.lstm`` under another name, so that IPEX goes on looking for quantized ones."""
    if torch.compiler.is_compiling():
        return aten.lstm.input(*args)
    return torch.ops.torch_ipex.ipex_lstm(*args)


def _joined(matrices: list[Tensor], biases: list[Tensor], zeros: list[Tensor]) -> list[Tensor]:
    pairs = zip(matrices[::2], matrices[1::2], biases, zeros, strict=True)
    return [each for cell in pairs for each in cell]


def _dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    zero_points = torch.zeros_like(scale, dtype=torch.int64)
    return torch._make_per_channel_quantized_tensor(codes, scale, zero_points, 0).dequantize()


def _last_of(output: Tensor, h_n: Tensor, bidirectional: bool, batch_first: bool) -> Tensor:
    """``h_n``, the last layer's states read off the output."""
    output = output.transpose(0, 1) if batch_first else output
    size = h_n.size(2)
    last = [output[-1, :, :size], *([output[0, :, size:]] if bidirectional else [])]
    return torch.cat([h_n[: -len(last)], torch.stack(last)])


def lower_lstms(context: PassContext) -> int:
    """Every LSTM with hidden states on a grid, in IPEX's form."""
    changed = 0
    for node in list(context.graph.find_nodes(op="call_function", target=LSTM)):
        x, hx, params, has_biases, layers, *options, scale, zero_point, _ = positional(node)
        grid = (number(context.gm, scale), int(number(context.gm, zero_point)))
        assert x.target is DEQUANTIZE_PER_TENSOR
        quantized, *grid_of_x = positional(x)
        cells = cells_of(params, has_biases)
        codes: list[fx.Node] = []
        scales: list[fx.Node] = []
        biases: list[fx.Node] = []
        for i, cell in enumerate(cells):
            assert all(each.target is DEQUANTIZE_PER_CHANNEL for each in cell[:2])
            codes += [argument(each, "q") for each in cell[:2]]
            scales.append(argument(cell[1], "scale"))
            inner = i >= len(cells) // layers
            shift = 0.0 if inner else grid[0] * (grid[1] - grid_of_x[1])
            bias = _bias(context, cell, shift)
            biases.append(new_constant(context.gm, f"{local_name(node)}.bias_{i}", bias, node))
        read = any(part_of(part)[1] == 0 for part in results(node))
        how = ((layers, *options), tuple(grid_of_x), grid, read)
        retarget(node, int8_lstm, (quantized, hx, codes, scales, biases, *how))
        changed += 1
    for node in context.graph.find_nodes(op="call_function", target=aten.lstm.input):
        if changed and not projected(node):
            node.target = float_lstm
    context.graph.eliminate_dead_code()
    return changed


def _bias(context: PassContext, cell: Any, shift: float) -> Tensor:
    """Both biases of a cell, and what ``shift`` added to each of its inputs amounts to."""
    w_ih, w_hh, *biases = cell
    rows = evaluate(context.gm, argument(w_ih, "q")).sum(1, dtype=torch.float32)
    bias = rows * evaluate(context.gm, argument(w_hh, "scale")) * shift
    return sum((evaluate(context.gm, each).detach() for each in biases), bias)


def _row(weight: Accepts) -> Kernel:
    unsigned = Accepts(
        QuantSpec(),
        lambda spec: spec.full_range and not spec.signed,
        "IPEX's LSTM takes unsigned activations of the full range of 8 bits",
    )
    return Kernel("lstm", unsigned, weight)


LSTM_KERNEL = Alone(
    "lstm",
    _row,
    "ipex::quantized_lstm",
    (int8_lstm,),
    lower_lstms,
    "IPEX runs it in float: nothing but its cell state is read, or the graph has an LSTM with "
    "projections, too",
)
