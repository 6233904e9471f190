"""Ranges stay as they were calibrated; weights and biases learn through the rounding.

Gradients pass straight through inside of the range and end outside: Jacob et al. 2018,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
section 3, with ranges that do not move.
"""

from __future__ import annotations

from torch_quant.qat.methods import QatMethod, register_qat_method

__all__ = ["Fixed"]


@register_qat_method
class Fixed(QatMethod):
    """``quantizer.qat(model, method="fixed")``."""

    name = "fixed"
