"""Linear layers between two grids that are known, with int8 weights: codes in, codes or floats out.

A call costs some microseconds beside its products, a third of what PyTorch's own operator takes,
which is most of a layer with few rows.
"""

from __future__ import annotations

import functools
import math
import struct

import torch
from torch import Tensor

from torch_quant.native import library as native
from torch_quant.native.dynamic import MOST_INPUTS
from torch_quant.native.functions import ends_of, function_of

__all__ = ["multiply", "pack_weight", "packed_for", "takes"]

_CALL = struct.Struct("@9q4dq")
"""``StaticCall`` of ``csrc/static.h``."""
_LANES = 16
_GROUP_BYTES = 64
_OUT = (torch.uint8, torch.float32)


@functools.cache
def _amx() -> bool:
    """Whether the CPU multiplies tiles of int8, for which these kernels have no code."""
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(known and known())


def packed_for() -> int:
    """How many numbers the kernels multiply together, which is what a weight is packed for.

    0 where others are faster: without the library, without VNNI, with AMX.
    """
    library = None if native.unavailable() else native.kernels()
    if library is None or _amx():
        return 0
    depth = int(library.torch_quant_depth())
    return depth if depth == 4 else 0


def _read_in_place(vector: Tensor | None) -> bool:
    return vector is None or (vector.dtype is torch.float32 and vector.is_contiguous())


def takes(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    out_dtype: torch.dtype,
    post_op: str,
    algorithm: str,
) -> bool:
    """Whether the kernel has what a layer asks for. It reads as far as these sizes say.

    Args:
        x: codes, ``[..., in]``.
        weight: ``[out, in]``, or with further dimensions of 1.
        weight_scale: ``[out]``.
        bias, factor: likewise, or None.
        out_dtype: of the result.
        post_op, algorithm: oneDNN's names of the function behind the product.
    """
    outputs, inputs = weight.shape[:2]
    return (
        x.dtype is torch.uint8
        and weight.dtype is torch.int8
        and 0 < inputs <= MOST_INPUTS
        and outputs > 0
        and _read_in_place(weight_scale)
        and _read_in_place(bias)
        and _read_in_place(factor)
        and out_dtype in _OUT
        and function_of(post_op, algorithm) is not None
    )


def pack_weight(weight: Tensor, zero_point: int, depth: int) -> Tensor:
    """A weight as the kernel reads it, and what inputs that are all ``zero_point`` add up to.

    Args:
        weight: int8, ``[out, in]``, or with further dimensions of 1.
        zero_point: of the inputs.
        depth: :func:`packed_for`.

    Returns:
        bytes: ``ceil(out / 16) * ceil(in / depth) * 64``, and 4 for each output, up to a multiple
        of 16.
    """
    library = native.kernels()
    assert library is not None
    outputs, inputs = weight.shape[:2]
    blocks = math.ceil(outputs / _LANES)
    size = blocks * math.ceil(inputs / depth) * _GROUP_BYTES
    packed = torch.empty(size + blocks * _LANES * 4, dtype=torch.uint8)
    plain = weight.detach().reshape(outputs, inputs).contiguous()
    library.torch_quant_pack(
        plain.data_ptr(), outputs, inputs, zero_point, packed.data_ptr(), packed.data_ptr() + size
    )
    return packed


def multiply(
    x: Tensor,
    x_scale: float,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    out_scale: float,
    out_zero_point: int,
    out_dtype: torch.dtype,
    post_op: str,
    post_args: list[float],
    algorithm: str,
) -> Tensor:
    """The layer that :func:`takes` was asked about.

    Args:
        x: uint8, ``[..., in]``.
        x_scale: of its grid.
        packed: :func:`pack_weight`.
        weight_scale: ``[out]``.
        bias: ``[out]``, or None.
        factor: likewise, of what is rounded.
        out_scale, out_zero_point, out_dtype: the grid of the result, for uint8.
        post_op, post_args, algorithm: the function behind the product.

    Returns:
        ``[..., out]``.

    Raises:
        MemoryError: there is none for a tile of sums.
    """
    library = native.kernels()
    assert library is not None
    if not x.is_contiguous():
        x = x.contiguous()
    inputs, outputs = x.shape[-1], weight_scale.numel()
    y = x.new_empty((*x.shape[:-1], outputs), dtype=out_dtype)
    place, sums = packed.data_ptr(), math.ceil(outputs / _LANES) * _LANES * 4
    found = function_of(post_op, algorithm)
    assert found is not None
    low, high = ends_of(post_op, post_args)
    call = _CALL.pack(
        place, place + packed.numel() - sums, weight_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(), 0 if factor is None else factor.data_ptr(),
        inputs, outputs, found[0], out_dtype is torch.float32,
        x_scale, 1.0 / out_scale, low, high, out_zero_point,
    )  # fmt: skip
    failed = library.torch_quant_static(
        torch.get_num_threads(), x.data_ptr(), y.data_ptr(), x.numel() // inputs, call
    )
    if failed:
        raise MemoryError(f"a linear layer: no memory for the sums of {outputs} outputs")
    return y
