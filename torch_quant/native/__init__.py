"""Kernels of this package's own, in C++: ``csrc`` has them, and installing builds them."""

from torch_quant.native.library import (
    VARIABLE,
    has_row_scales,
    instruction_sets,
    unavailable,
    using,
)

__all__ = ["VARIABLE", "has_row_scales", "instruction_sets", "unavailable", "using"]
