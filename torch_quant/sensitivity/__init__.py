"""Which sites quantization hurts, by how much, and which of them to take back to float."""

from torch_quant.sensitivity.gram import NoiseGram
from torch_quant.sensitivity.groups import find_groups
from torch_quant.sensitivity.ranking import METRICS, Ranking, Sensitivity
from torch_quant.sensitivity.records import Recorder, SiteStats
from torch_quant.sensitivity.selection import fewest_for, most_within

__all__ = [
    "METRICS",
    "NoiseGram",
    "Ranking",
    "Recorder",
    "Sensitivity",
    "SiteStats",
    "fewest_for",
    "find_groups",
    "most_within",
]
