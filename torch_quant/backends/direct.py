"""The shortest way to the graph of a layer: one tensor in, one tensor out.

A language model calls hundreds of such graphs for each token, and what it takes to match a call of
any kind would cost as much as their kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_quant.graph.binding import CallSignature, bind
from torch_quant.graph.calls import flatten_call
from torch_quant.graph.kinds import Kind
from torch_quant.graph.outputs import flatten_output
from torch_quant.graph.shapes import ShapeContract

__all__ = ["Direct", "direct"]


@dataclass(frozen=True)
class Direct:
    """Whether a tensor is what a graph takes, and the graph.

    Args:
        function: computes it.
        dtype: of the tensor.
        rank: of the tensor.
        fixed: axis and size of what is not free.
    """

    function: Callable[[Tensor], Any]
    dtype: torch.dtype
    rank: int
    fixed: tuple[tuple[int, int], ...]

    def takes(self, x: Any) -> bool:
        """Whether the graph serves a call with ``x`` alone."""
        if type(x) is not Tensor or x.dtype is not self.dtype:
            return False
        shape = x.shape
        return len(shape) == self.rank and all(shape[axis] == size for axis, size in self.fixed)


def direct(
    function: Callable[[Tensor], Any],
    kind: Kind,
    contract: ShapeContract,
    out_spec: Any,
    signature: Any,
) -> Direct | None:
    """The direct way to a graph, None if its calls are no single tensor, or sizes are conditional.

    Args:
        function: the graph, which gives a tuple of leaves.
        kind: of the calls that it serves.
        contract: the sizes that it serves.
        out_spec: how its outputs nest.
        signature: of the module.
    """
    if len(kind.leaves) != 1 or not isinstance(kind.leaves[0][0], torch.dtype):
        return None
    dtype, rank = kind.leaves[0]
    if contract.conditions or contract.derived or not isinstance(signature, CallSignature):
        return None
    (sizes,) = contract.shapes
    free = [size for size in sizes if not isinstance(size, int)]
    if len(set(free)) < len(free):
        return None
    x = torch.empty([size if isinstance(size, int) else 2 for size in sizes], dtype=dtype)
    if flatten_call(*bind(signature, (x,), {})).nesting != kind.nesting:
        return None
    if out_spec != flatten_output(x)[1]:
        return None
    fixed = tuple((axis, size) for axis, size in enumerate(sizes) if isinstance(size, int))
    return Direct(function, dtype, rank, fixed)
