"""oneDNN's int8 kernels as PyTorch has them, and this package's own for language models."""

from torch_quant.backends.onednn.backend import OneDNNBackend

__all__ = ["OneDNNBackend"]
