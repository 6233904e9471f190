"""Weights rounded with data, a part of the model at a time, each fed by the rounded ones before."""

from torch_quant.rounding.driver import round_weights
from torch_quant.rounding.report import BlockError, Rounding
from torch_quant.rounding.ways import rounded
from torch_quant.rounding.weights import FloatWeights

__all__ = ["BlockError", "FloatWeights", "Rounding", "round_weights", "rounded"]
