"""onnxruntime in this process."""

from torch_quant.backends.onnxruntime.backend import OnnxRuntimeBackend

__all__ = ["OnnxRuntimeBackend"]
