"""Kernels of this package's own, in C++: ``csrc`` has them, and installing builds them."""

from torch_quant.native.library import (
    VARIABLE,
    instruction_sets,
    unavailable,
    using,
)

__all__ = ["VARIABLE", "instruction_sets", "unavailable", "using"]
