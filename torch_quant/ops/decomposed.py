"""The ``quantized_decomposed`` operators, which PyTorch's ONNX exporter translates.

The one place that touches ``torch.ao``, for these definitions only, when they are first needed.
"""

from __future__ import annotations

from typing import Any

__all__ = ["NAMESPACE", "decomposed"]

NAMESPACE = "quantized_decomposed"


def decomposed() -> Any:
    """``torch.ops.quantized_decomposed``, defined by now."""
    import torch.ao.quantization.fx._decomposed

    return getattr(torch.ops, NAMESPACE)
