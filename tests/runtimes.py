"""What the tests of runtimes in this process share."""

from __future__ import annotations

import pytest
from thinning import rarely
from torch import nn

from torch_quant.backends import OnnxRuntimeBackend, OpenVINOBackend
from torch_quant.backends.in_process import InProcess
from torch_quant.backends.onnx.in_process import InProcessBackend

__all__ = ["RUNTIMES", "by_onnxruntime", "by_openvino", "compiled", "each_runtime"]

RUNTIMES: dict[str, type[InProcessBackend]] = {
    "onnxruntime": OnnxRuntimeBackend, "openvino": OpenVINOBackend
}  # fmt: skip
each_runtime = pytest.mark.parametrize("name", RUNTIMES)
by_onnxruntime = pytest.mark.parametrize("name", ["onnxruntime", rarely("openvino")])
"""For what does not depend on the runtime; tests take them in turns, and the long run has both."""
by_openvino = pytest.mark.parametrize("name", ["openvino", rarely("onnxruntime")])


def compiled(model: nn.Module) -> InProcess:
    """What the first graph of a quantized model runs."""
    found = model.graphs[0].compiled
    assert isinstance(found, InProcess)
    return found
