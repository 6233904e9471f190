"""Learned clipping of activations: Choi et al. 2018, "PACT: Parameterized Clipping Activation for
Quantized Neural Networks".

    y = clip(x, 0, alpha),   dy/dalpha = 1 where x >= alpha, else 0      (equations 1 and 3)

The clipping level is the upper end of the range, ``alpha = scale * (quant_max - zero_point)``, so
the scale is what is learned: only what is clipped has a say. The paper adds an L2 penalty on
``alpha``; add it to the loss, over ``quantizer.parameter_groups(...)[1]["params"]``. The ranges of
weights stay.
"""

from __future__ import annotations

from torch import Tensor

from torch_quant.core.spec import QuantSpec
from torch_quant.qat.methods import INPUT, QatMethod, Rounding, register_qat_method

__all__ = ["LearnedClipping"]


@register_qat_method
class LearnedClipping(QatMethod):
    """``quantizer.qat(model, method="pact")``."""

    name = "pact"

    def learns_scale(self, role: str, spec: QuantSpec) -> bool:
        """Those of activations."""
        return role == INPUT and not spec.dynamic

    def scale_gradient(self, rounding: Rounding) -> Tensor:
        """An end of the range in units of the scale outside, 0 inside."""
        return rounding.ends_outside / rounding.scale
