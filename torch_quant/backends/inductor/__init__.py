"""PyTorch's compiler."""

from torch_quant.backends.inductor.backend import InductorBackend

__all__ = ["InductorBackend"]
