"""Observers: streaming statistics of a tensor, and the range they suggest. One family a file."""

from torch_quant.observers.ao_adapter import from_ao
from torch_quant.observers.base import OBSERVERS, Observer, observer_class, register_observer
from torch_quant.observers.defaults import DEFAULT_OBSERVER
from torch_quant.observers.entropy import EntropyObserver
from torch_quant.observers.histogram import HistogramObserver
from torch_quant.observers.minmax import MinMaxObserver
from torch_quant.observers.moving_average import MovingAverageObserver
from torch_quant.observers.percentile import PercentileObserver

__all__ = [
    "OBSERVERS",
    "Observer",
    "observer_class",
    "register_observer",
    "EntropyObserver",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "PercentileObserver",
    "DEFAULT_OBSERVER",
    "from_ao",
]
