"""Operators that IPEX runs on a kernel of their own, outside of the partitions that it fuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch_quant.core.kernels import Accepts, Kernel
from torch_quant.passes.base import PassContext

__all__ = ["Alone"]


@dataclass(frozen=True)
class Alone:
    """One such operator.

    Args:
        op: the op type.
        row: of the kernel table, given the weights that IPEX takes elsewhere.
        kernel: what the graph that ran calls it.
        functions: what stands for it in the lowered graph; each has the argument ``codes``, an int8
            weight or a list of them.
        lower: puts them there.
        missing: why a call of it is not on the kernel.
    """

    op: str
    row: Callable[[Accepts], Kernel]
    kernel: str
    functions: tuple[Any, ...]
    lower: Callable[[PassContext], int]
    missing: str
