"""Weights rounded a block of the model at a time, each block fed by the rounded ones before."""

from torch_quant.rounding.driver import round_weights
from torch_quant.rounding.report import BlockError, Rounding
from torch_quant.rounding.weights import FloatWeights

__all__ = ["BlockError", "FloatWeights", "Rounding", "round_weights"]
