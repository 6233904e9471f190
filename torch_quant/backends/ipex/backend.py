"""Intel Extension for PyTorch: oneDNN Graph behind TorchScript, the fastest here for transformers.

The lowered graph holds PyTorch's quantize and dequantize around float operators. Traced and frozen,
IPEX turns them into int8 kernels with everything around a product fused in.

Intel archived the project in March 2026, with security issues that nobody will mend; it needs torch
2.8. ``Backend.ONEDNN`` runs on the same machines and is maintained with PyTorch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.backends.base import Backend, register_backend
from torch_quant.backends.int8 import has_vnni, symmetric_weight
from torch_quant.backends.ipex import ops
from torch_quant.backends.ipex.forms import graph_forms
from torch_quant.backends.ipex.guards import GUARDS, guard_convolutions
from torch_quant.backends.ipex.trace import (
    INSTALL,
    WRITES,
    FusedGraph,
    import_failure,
    import_ipex,
    record,
    writes_in_place,
)
from torch_quant.backends.ipex.verify import ALONE, IPEXReport, verify
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.core.kernels import Accepts, Kernel, KernelTable
from torch_quant.core.plan import QuantPlan
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.ops.arguments import positional, retarget
from torch_quant.ops.qdq import DEQUANTIZE_PER_CHANNEL, DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR
from torch_quant.passes.base import PassContext, run_passes
from torch_quant.passes.fold_scales import fold_scales

__all__ = ["IPEXBackend"]

_PRODUCTS = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d")


def _release(package: str) -> tuple[str, list[int]] | None:
    """The version of an installed package, as text and as (major, minor), or None."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return version, [int(part) for part in version.split(".")[:2]]


def _missing() -> str | None:
    """What can be told without loading IPEX, which takes long and replaces float kernels."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not sys.platform.startswith(
        "linux"
    ):
        return f"IPEX is for x86 Linux, this is {platform.machine()} {sys.platform}"
    if importlib.util.find_spec("intel_extension_for_pytorch") is None:
        return f"intel-extension-for-pytorch is not installed; {INSTALL}"
    ipex, transformers = _release("intel-extension-for-pytorch"), _release("transformers")
    if ipex is not None and torch.__version__.split(".")[:2] != ipex[0].split(".")[:2]:
        return (
            f"intel-extension-for-pytorch {ipex[0]} needs torch {ipex[0].rpartition('.')[0]}, "
            f"this is {torch.__version__}; {INSTALL}"
        )
    if transformers is not None and transformers[1] >= [5, 24]:
        return (
            "intel-extension-for-pytorch imports transformers and fails beside 5.24 and newer "
            f"(NameError: MoeModelOutputWithPast), this is {transformers[0]}; {INSTALL}"
        )
    return None


@register_backend
class IPEXBackend(Backend):
    """Kernels of IPEX 2.8. Chosen by name only, since IPEX is no longer maintained.

    The quantized model traces, freezes and warms itself up at its first call; traced by the user,
    it gives a TorchScript file that a process which imports IPEX can load.

    Args:
        bfloat16: run what stays in float in bfloat16, int8 products giving bfloat16 too.
        int8_shortcuts: add shortcuts of residual blocks as integers, as the recipe of IPEX does.
            By default where the sum is rectified: ResNet gets a quarter faster for at most 0.3 dB.
            True does so everywhere, False nowhere.
    """

    name = "ipex"
    priority = -10
    compiles = True

    def __init__(self, *, bfloat16: bool = False, int8_shortcuts: bool | None = None) -> None:
        self.bfloat16, self.int8_shortcuts = bfloat16, int8_shortcuts

    def unavailable(self) -> str | None:
        return _missing() or import_failure()

    def _kernels(self) -> KernelTable:
        activation = Accepts(
            QuantSpec(),
            lambda spec: spec.full_range,
            "IPEX quantizes activations to the full range of 8 bits",
        )
        weight = Accepts(
            symmetric_weight(bits=8 if has_vnni() else 7),
            lambda spec: spec.signed and spec.symmetric and spec.per_channel,
            "IPEX wants a signed symmetric per-channel weight",
        )
        return KernelTable(
            self.name,
            (
                *(Kernel(op, activation, weight) for op in _PRODUCTS),
                Kernel("matmul", activation),
                Kernel("scaled_dot_product_attention", activation),
                Kernel("embedding", None, weight),
                *(alone.row(weight) for alone in ALONE),
            ),
        )

    def lower(self, context: PassContext) -> fx.GraphModule:
        import_ipex()  # what traces the graph needs it, and its overrides of float kernels
        forms = graph_forms(int8_shortcuts=self.int8_shortcuts)
        first = (fold_scales, guard_convolutions, *(alone.lower for alone in ALONE))
        run_passes(context, [*first, *forms, *GUARDS, quantized_tensors])
        return context.gm

    def compile(self, graph: QuantizedGraph, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        if writes_in_place(graph.body):
            return graph.body
        return FusedGraph(graph.body, tensors, bfloat16=self.bfloat16)

    def record(self, body: fx.GraphModule, tensors: tuple[Tensor, ...]) -> Any:
        if writes_in_place(body):
            raise InvalidConfig(f"the model cannot be traced for IPEX: {WRITES}")
        return record(body, tensors, bfloat16=self.bfloat16)

    def verify(
        self,
        subject: nn.Module | str | os.PathLike[str],
        example_inputs: Any = None,
        *,
        plan: QuantPlan | None = None,
    ) -> IPEXReport:
        """Run a model on an example and compare what IPEX fused with what should be in int8.

        Args:
            subject: what ``Quantizer.quantize`` returned, or a traced and frozen module of it.
            example_inputs: as for :meth:`Quantizer.calib`.
            plan: the quantizer's plan; needed to name the sites of a traced module.

        Raises:
            InvalidConfig: ``subject`` is no module.
        """
        if not isinstance(subject, nn.Module):
            raise InvalidConfig(
                f"expected the quantized model, got {subject!r}; of a file, give "
                "torch.jit.load(path)"
            )
        return verify(subject, example_inputs, plan)

    def __repr__(self) -> str:
        return f"{super().__repr__()}{' with bfloat16' if self.bfloat16 else ''}"


def quantized_tensors(context: PassContext) -> int:
    """Put quantized tensors in the place of quantize, dequantize and int8 weights."""
    changed = 0
    for node in list(context.graph.nodes):
        if node.target is QUANTIZE_PER_TENSOR:
            x, scale, zero_point, _, _, dtype = positional(node)
            retarget(node, ops.quantize, (x, scale, zero_point, dtype))
        elif node.target is DEQUANTIZE_PER_TENSOR:
            retarget(node, ops.dequantize, positional(node)[:1])
        elif node.target is DEQUANTIZE_PER_CHANNEL:
            retarget(node, ops.dequantize_weight, positional(node))
        else:
            continue
        changed += 1
    return changed
