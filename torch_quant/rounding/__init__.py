"""Weights rounded a block of the model at a time, each block fed by the rounded ones before."""

from torch_quant.rounding.driver import round_weights
from torch_quant.rounding.report import BlockError, Rounding

__all__ = ["BlockError", "Rounding", "round_weights"]
