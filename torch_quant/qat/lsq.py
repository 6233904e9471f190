"""Learned step sizes: Esser et al. 2020, "Learned Step Size Quantization".

The scales of weights and activations are parameters. Their gradient is equation 3 of the paper,
times ``1 / sqrt(N Qp)`` (section 2.2), which brings the updates of a scale to the size of those of
weights. ``N`` is how many elements share the scale: of a weight, or of one sample of an activation,
since a loss is a mean over samples. ``Qp`` is the largest value of the format.
"""

from __future__ import annotations

from torch_quant.core.spec import QuantSpec
from torch_quant.qat.methods import QatMethod, Rounding, register_qat_method

__all__ = ["LearnedStep"]


@register_qat_method
class LearnedStep(QatMethod):
    """``quantizer.qat(model, method="lsq")``, the default.

    The paper starts from ``2 mean|v| / sqrt(Qp)``; here the start is the calibrated range, so that
    the first step computes what ``quantize`` would deploy.
    """

    name = "lsq"

    def learns_scale(self, role: str, spec: QuantSpec) -> bool:
        """Whatever has scales that are kept; dynamic ones are chosen at each call."""
        return not spec.dynamic

    def gradient_scale(self, rounding: Rounding) -> float:
        """``1 / sqrt(N Qp)``."""
        return float((rounding.elements * rounding.element.quant_max) ** -0.5)
