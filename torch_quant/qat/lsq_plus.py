"""Learned steps and offsets: Bhalgat et al. 2020, "LSQ+: Improving low-bit quantization through
learnable offsets and better initialization".

Activations with zero points learn these too (equation 6 of the paper). The paper's offset ``beta``
is a real number; kernels have integers, so it is ``beta = -zero_point * scale`` here, and zero
points are rounded in the forward pass, straight-through in the backward one.
"""

from __future__ import annotations

from torch_quant.core.spec import QuantSpec
from torch_quant.qat.lsq import LearnedStep
from torch_quant.qat.methods import INPUT, register_qat_method

__all__ = ["LearnedStepAndOffset"]


@register_qat_method
class LearnedStepAndOffset(LearnedStep):
    """``quantizer.qat(model, method="lsq_plus")``."""

    name = "lsq_plus"

    def learns_zero_point(self, role: str, spec: QuantSpec) -> bool:
        """Those of activations that are not symmetric."""
        return role == INPUT and not spec.symmetric and not spec.dynamic
