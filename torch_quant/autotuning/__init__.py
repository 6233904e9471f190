"""The best of several configurations by a metric of the user's."""

from torch_quant.autotuning.search import autotune
from torch_quant.report.autotuning import Autotuning, Tried

__all__ = ["Autotuning", "Tried", "autotune"]
