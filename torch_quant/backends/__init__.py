"""Runtimes. Importing this package registers every backend."""

from torch_quant.backends.base import (
    VARIABLE,
    Backend,
    Verification,
    available_backends,
    backend_of_environment,
    best_backend,
    known_backends,
    register_backend,
    register_kernel,
    usable_backend,
)
from torch_quant.backends.blade import DiscBackend
from torch_quant.backends.inductor import InductorBackend
from torch_quant.backends.ipex import IPEXBackend
from torch_quant.backends.onednn import OneDNNBackend
from torch_quant.backends.onnx import OnnxBackend
from torch_quant.backends.onnxruntime import OnnxRuntimeBackend
from torch_quant.backends.openvino import OpenVINOBackend
from torch_quant.backends.reference import ReferenceBackend

__all__ = [
    "VARIABLE",
    "Backend",
    "DiscBackend",
    "IPEXBackend",
    "InductorBackend",
    "OneDNNBackend",
    "OnnxBackend",
    "OnnxRuntimeBackend",
    "OpenVINOBackend",
    "ReferenceBackend",
    "Verification",
    "available_backends",
    "backend_of_environment",
    "best_backend",
    "known_backends",
    "register_backend",
    "register_kernel",
    "usable_backend",
]
