"""Checkpoints of quantized language models that others load, and reading them back."""

from torch_quant.checkpoints.loading import load_checkpoint
from torch_quant.checkpoints.quantizing import quantize_checkpoint
from torch_quant.checkpoints.writing import export_checkpoint

__all__ = ["export_checkpoint", "load_checkpoint", "quantize_checkpoint"]
