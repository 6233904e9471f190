"""ONNX: the backend, and the check of its files."""

from torch_quant.backends.onnx.backend import OnnxBackend, missing_packages

__all__ = ["OnnxBackend", "missing_packages"]
