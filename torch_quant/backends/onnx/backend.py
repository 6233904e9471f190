"""ONNX with quantize/dequantize pairs, for onnxruntime, OpenVINO and whatever else reads them.

In PyTorch the quantized model computes, in float arithmetic, the numbers that the file stands for;
``torch_quant.export_onnx`` writes the file, or ``torch.onnx.export(quant_model, args)``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx, nn

from torch_quant.backends.base import Backend, register_backend
from torch_quant.backends.int8 import has_vnni, symmetric_weight
from torch_quant.backends.onnx.forms import FORMS, GRIDS
from torch_quant.core.granularity import PerChannel, PerGroup
from torch_quant.core.kernels import Accepts, Kernel, KernelTable
from torch_quant.core.packages import missing_packages
from torch_quant.core.plan import QuantPlan
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.passes.base import Pass, PassContext, run_passes

if TYPE_CHECKING:
    from torch_quant.backends.onnx.verify import OnnxReport

__all__ = ["OnnxBackend"]

_CONVS = ("conv1d", "conv2d", "conv3d")
_WANTED = (
    "beside float activations, onnxruntime's kernels want signed weights of 4 or 8 bits with zero "
    "at 0, and a scale for each output channel or group of inputs"
)


def _in_blocks(spec: QuantSpec) -> bool:
    """Whether a format of weights has a kernel that takes float activations."""
    integers = spec.integer and spec.bits in (4, 8) and spec.signed and spec.symmetric
    return integers and isinstance(spec.granularity, (PerChannel, PerGroup))


@register_backend
class OnnxBackend(Backend):
    """Quantize/dequantize pairs where onnxruntime's CPU kernels want them.

    A convolution's result is quantized too, since its int8 kernel gives nothing else; sums of such
    results are sums of integers. Transposed convolutions have no int8 kernel and stay in float.
    Without VNNI, weights are kept to 7 bits, with which sums of two products cannot saturate.
    """

    grids: ClassVar[tuple[Pass, ...]] = GRIDS
    """What changes numbers before the graph is lowered."""
    forms: ClassVar[tuple[Pass, ...]] = FORMS
    """What the graph is lowered by."""
    name = "onnx"
    priority = -10  # a file format: for running in PyTorch, others are faster
    one_graph = True
    has_kernels = False
    not_in_torchscript = (
        "a process that loads the file does not know its operators: export_onnx(...) writes it"
    )

    def unavailable(self) -> str | None:
        return missing_packages("onnx", "onnxscript")

    def _kernels(self) -> KernelTable:
        activation = Accepts(QuantSpec())
        default = symmetric_weight(bits=8 if has_vnni() else 7)
        weight = Accepts(
            default,
            lambda spec: not spec.float_zero_points and (spec.symmetric or not spec.per_channel),
            "onnxruntime's kernels want one integer zero point for all channels",
        )
        return KernelTable(
            self.name,
            (
                *(Kernel(conv, activation, weight, activation) for conv in _CONVS),
                Kernel("linear", activation, weight),
                Kernel("linear", None, Accepts(symmetric_weight(), _in_blocks, _WANTED, True)),
                Kernel("matmul", activation),
                Kernel("scaled_dot_product_attention", activation),
                Kernel("embedding", None, Accepts(default)),
            ),
            passes=self.grids,
        )

    def lower(self, context: PassContext) -> fx.GraphModule:
        run_passes(context, self.forms)
        return context.gm

    def verify(
        self,
        subject: nn.Module | str | os.PathLike[str],
        example_inputs: Any = None,
        *,
        plan: QuantPlan | None = None,
    ) -> OnnxReport:
        """Check an exported file and list what onnxruntime fuses of it.

        Args:
            subject: the file.
            example_inputs: not taken, since the file is not run.
            plan: not taken, since the file holds it.

        Raises:
            BackendUnavailable: onnx or onnxruntime is not installed.
            InvalidConfig: the file cannot be read, or is no valid model; ``subject`` is no path, or
                something is given beside it.
        """
        from torch_quant.backends.onnx.verify import verify

        if isinstance(subject, nn.Module):
            raise InvalidConfig(
                "expected the path of an exported file, got a model: "
                'torch_quant.export_onnx(quant_model, example_inputs, "model.onnx") writes one'
            )
        if example_inputs is not None or plan is not None:
            raise InvalidConfig("verify takes the file alone: it is not run, and holds its plan")
        return verify(subject)
