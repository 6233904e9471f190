"""torch_blade (BladeDISC): the model as it takes it, which is TorchScript with fake-quantizers.

Its compiler finds a linear layer whose input, weight and result are fake-quantized, with signed
codes and zero points of 0, and puts one int8 product there. On x86, weights have a scale for each
output channel; on aarch64, one. Nothing else is quantized there. In PyTorch the quantized model
computes the same numbers in float. What torch_blade wants is checked by :meth:`DiscBackend.verify`;
torch_blade itself is not needed for it.
"""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import fx, nn

from torch_quant.backends.base import Backend, register_backend
from torch_quant.backends.blade.forms import fake_quantizers
from torch_quant.backends.int8 import symmetric_weight
from torch_quant.core.kernels import Accepts, Kernel, KernelTable
from torch_quant.core.plan import QuantPlan
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.passes.base import PassContext, run_passes
from torch_quant.passes.fold_scales import fold_scales

if TYPE_CHECKING:
    from torch_quant.backends.blade.verify import DiscReport

__all__ = ["DiscBackend"]

Machine = Literal["x86", "aarch64"]
_SIGNED = QuantSpec.of(bits=8, signed=True, symmetric=True)


def _this_machine() -> Machine:
    return "aarch64" if platform.machine().lower() in ("aarch64", "arm64") else "x86"


@register_backend
class DiscBackend(Backend):
    """Linear layers between fake-quantizers, for torch_blade.

    ``export_torchscript(quant_model, example, path)`` writes the file. It is not frozen: freezing
    would round the weights once and for all and leave no quantizer.

    Args:
        machine: that the file is for, ``"x86"`` or ``"aarch64"``; None for the present one.

    Raises:
        InvalidConfig: ``machine`` is neither.

    >>> DiscBackend(machine="aarch64")
    Backend.DISC for aarch64
    """

    name = "disc"
    priority = -10  # a file format: for running in PyTorch, others are faster
    has_kernels = False
    frozen: ClassVar[bool] = False

    def __init__(self, *, machine: Machine | None = None) -> None:
        if machine not in (None, "x86", "aarch64"):
            raise InvalidConfig(f"machine={machine!r}: expected 'x86', 'aarch64' or None")
        self.machine: Machine = machine or _this_machine()

    def unavailable(self) -> str | None:
        return None

    def _kernels(self) -> KernelTable:
        activation = Accepts(
            _SIGNED,
            lambda spec: spec == _SIGNED,
            "torch_blade takes activations in s8 symmetric per-tensor alone",
        )
        one = self.machine == "aarch64"
        wanted = _SIGNED if one else symmetric_weight()
        weight = Accepts(
            wanted,
            lambda spec: spec == wanted,
            f"torch_blade takes weights in {wanted} alone on {self.machine}",
        )
        return KernelTable(
            self.name, (Kernel("linear", activation, weight, activation, own_result=True),)
        )

    def lower(self, context: PassContext) -> fx.GraphModule:
        run_passes(context, (fold_scales, fake_quantizers))
        return context.gm

    def verify(
        self,
        subject: nn.Module | str | os.PathLike[str],
        example_inputs: Any = None,
        *,
        plan: QuantPlan | None = None,
    ) -> DiscReport:
        """Check that TorchScript is as torch_blade takes it, requirement by requirement.

        Args:
            subject: traced TorchScript of a model that was quantized for this backend, or its file.
            example_inputs: not taken, since nothing is run.
            plan: the quantizer's; then its int8 layers must all be found.

        Raises:
            InvalidConfig: a requirement is not met: says of which node, what was expected and what
                is there, and how to get there; ``subject`` is neither.
        """
        from torch_quant.backends.blade.verify import verify

        if example_inputs is not None:
            raise InvalidConfig("verify takes TorchScript alone: nothing is run")
        return verify(subject, self.machine, plan)

    def __repr__(self) -> str:
        note = "" if self.machine == _this_machine() else f" for {self.machine}"
        return f"{super().__repr__()}{note}"
