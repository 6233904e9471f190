"""Intel Extension for PyTorch: the backend, and what it takes to use IPEX's kernels right."""

from torch_quant.backends.ipex.backend import IPEXBackend

__all__ = ["IPEXBackend"]
