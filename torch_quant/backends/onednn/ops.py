"""Operators over PyTorch's oneDNN int8 kernels that can be traced, copied, exported and saved.

The kernels want a weight packed for the machine, an opaque tensor that none of these can carry. So
the operators take the plain int8 weight and pack it at the first call, into a cache. Linear layers,
and convolutions of single pixels, run on this package's own kernel where that is faster.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from torch_quant.backends.convolutions import right_windows
from torch_quant.backends.onednn.cache import PackedWeights
from torch_quant.errors import InvalidConfig
from torch_quant.native import static
from torch_quant.native.rows import ROUND_ROWS
from torch_quant.ops.library import define_operator
from torch_quant.ops.rows import register_row_operator

__all__ = ["CONV", "LINEAR", "PACKED", "QUANTIZE_FAST"]


_QUANTIZED = {torch.uint8: torch.quint8, torch.int8: torch.qint8}
PACKED = PackedWeights()
"""The packed weights of this process."""


@functools.cache
def _warn_no_more() -> None:
    """PyTorch warns once that quantized dtypes will go; there is nothing a user could do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)


def _quantize(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    _warn_no_more()
    q = torch.quantize_per_tensor(x, scale, zero_point, _QUANTIZED[dtype])
    # The codes are the storage itself; int_repr would copy them.
    return torch.empty(0, dtype=dtype).set_(q.untyped_storage(), 0, q.shape, q.stride())


def _check(inputs: int, wanted: int, weight: Tensor, *vectors: tuple[str, Tensor | None]) -> None:
    """Sizes that do not fit; files of other formats call the operators without any guard."""
    if inputs != wanted:
        raise InvalidConfig(f"a quantized layer: expected {wanted} inputs, got {inputs}")
    outputs = weight.shape[0]
    for name, vector in vectors:
        if vector is not None and vector.numel() != outputs:
            raise InvalidConfig(
                f"a quantized layer: expected a {name} of {outputs}, got {tuple(vector.shape)}"
            )


def _packed(weight: Tensor, x_zero_point: int, depth: int) -> Tensor:
    """A weight packed for this package's own kernel."""
    return PACKED.get(
        weight,
        ("static", x_zero_point, depth),
        lambda: static.pack_weight(weight, x_zero_point, depth),
    )[0]


def _linear(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_scale: float,
    out_zero_point: int,
    out_dtype: torch.dtype,
    post_op: str,
    post_args: list[float],
    algorithm: str,
    factor: Tensor | None = None,
) -> Tensor:
    vectors = ("scale", weight_scale), ("bias", bias), ("factor", factor)
    _check(x.shape[-1] if x.dim() else 0, weight.shape[1], weight, *vectors)
    ending = (out_scale, out_zero_point, out_dtype, post_op, post_args, algorithm)
    depth = static.packed_for()
    if depth and static.takes(x, weight, weight_scale, bias, factor, out_dtype, post_op, algorithm):
        ours = _packed(weight, x_zero_point, depth)
        return static.multiply(x, x_scale, ours, weight_scale, bias, factor, *ending)
    if factor is not None:  # oneDNN has none
        gelu = (post_op, algorithm) == ("gelu", "none")
        real = (1.0, 0, torch.float32, "none" if gelu else post_op, post_args, algorithm)
        y = _linear(x, x_scale, x_zero_point, weight, weight_scale, bias, *real)
        grid = (out_scale, out_zero_point, out_dtype)
        return ROUND_ROWS(y, factor, "gelu" if gelu else "none", *grid)  # type: ignore[no-any-return]
    packed, zero_points = PACKED.get(
        weight, (), lambda: torch.ops.onednn.qlinear_prepack(weight, None)
    )
    y = torch.ops.onednn.qlinear_pointwise(
        x, x_scale, x_zero_point, packed, weight_scale, zero_points, bias, *ending
    )
    # It gives [0, out] where there are no rows.
    return y if x.numel() else y.reshape(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]


def _conv(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    out_scale: float,
    out_zero_point: int,
    out_dtype: torch.dtype,
    post_op: str,
    post_args: list[float],
) -> Tensor:
    channels = weight.shape[1] * groups
    _check(x.shape[1], channels, weight, ("scale", weight_scale), ("bias", bias))
    depth = static.packed_for() if groups == 1 and x.dim() == 4 else 0
    if depth and _of_pixels(weight, stride, padding):
        rows = x.permute(0, 2, 3, 1)
        if rows.is_contiguous() and static.takes(
            rows, weight, weight_scale, bias, None, out_dtype, post_op, ""
        ):
            ours = _packed(weight, x_zero_point, depth)
            y = static.multiply(
                rows, x_scale, ours, weight_scale, bias, None, out_scale, out_zero_point,
                out_dtype, post_op, post_args, "",
            )  # fmt: skip
            return y.permute(0, 3, 1, 2)
    sizes, geometry = tuple(x.shape), (stride, padding, dilation, groups)
    plain = (tuple(stride), tuple(padding), tuple(dilation))
    right = right_windows(sizes[2:], weight.shape, *plain, groups)
    if right is not None:
        if right.pads:
            x = torch.constant_pad_nd(x, right.pads, x_zero_point)
        y = _conv(
            x, x_scale, x_zero_point, weight, weight_scale, bias, list(right.stride),
            list(right.padding), dilation, groups, out_scale, out_zero_point, out_dtype, post_op,
            post_args,
        )  # fmt: skip
        return y if right.end is None else _channels_last(y[..., : right.end])
    packed, zero_points = PACKED.get(
        weight,
        (x_scale, x_zero_point, plain, groups, sizes),
        lambda: torch.ops.onednn.qconv_prepack(
            weight, weight_scale, x_scale, x_zero_point, *geometry, sizes
        ),
    )
    return torch.ops.onednn.qconv_pointwise(  # type: ignore[no-any-return]
        x, x_scale, x_zero_point, packed, weight_scale, zero_points, bias, *geometry,
        out_scale, out_zero_point, out_dtype, post_op, post_args, "",
    )  # fmt: skip


def _channels_last(x: Tensor) -> Tensor:
    """As the kernels give their results."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _of_pixels(weight: Tensor, stride: list[int], padding: list[int]) -> bool:
    """Whether a convolution multiplies each pixel on its own."""
    return (
        all(size == 1 for size in weight.shape[2:])
        and all(step == 1 for step in stride)
        and not any(padding)
    )


def _image_sizes(x: Tensor, weight: Tensor, *geometry: Any) -> list[Any]:
    stride, padding, dilation = geometry
    return [
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i]
        + 1
        for i in range(x.dim() - 2)
    ]


def _fake_quantize(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=suggest_memory_format(x))


def _fake_linear(x: Tensor, *args: Any) -> Tensor:
    weight, out_dtype = args[2], args[7]
    torch._check(x.shape[-1] == weight.shape[1])
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


def _fake_conv(x: Tensor, *args: Any) -> Tensor:
    weight, geometry, groups, out_dtype = args[2], args[5:8], args[8], args[11]
    torch._check(x.shape[1] == weight.shape[1] * groups)
    shape = (x.shape[0], *_image_sizes(x, weight, *geometry), weight.shape[0])
    return x.new_empty(shape, dtype=out_dtype).movedim(-1, 1)  # the kernel puts channels last


QUANTIZE_FAST = define_operator(
    "onednn_quantize(Tensor x, float scale, int zero_point, ScalarType dtype) -> Tensor",
    _quantize,
    _fake_quantize,
    keys=("CPU",),
)
LINEAR = define_operator(
    "onednn_linear(Tensor x, float x_scale, int x_zero_point, Tensor weight, Tensor weight_scale, "
    "Tensor? bias, float out_scale, int out_zero_point, ScalarType out_dtype, "
    "str post_op, float[] post_args, str algorithm, Tensor? factor=None) -> Tensor",
    _linear,
    _fake_linear,
    keys=("CPU",),
)
CONV = define_operator(
    "onednn_conv(Tensor x, float x_scale, int x_zero_point, Tensor weight, Tensor weight_scale, "
    "Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, float out_scale, "
    "int out_zero_point, ScalarType out_dtype, str post_op, float[] post_args) -> Tensor",
    _conv,
    _fake_conv,
    keys=("CPU",),
)
register_row_operator(QUANTIZE_FAST, 0)
register_row_operator(LINEAR, 0)
