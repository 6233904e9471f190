"""ONNX: the backend, and the check of its files."""

from torch_quant.backends.onnx.backend import OnnxBackend

__all__ = ["OnnxBackend"]
