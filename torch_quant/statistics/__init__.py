"""What calibration records of a tensor. Observers suggest a range. One family a file."""

from torch_quant.statistics.ao_adapter import from_ao
from torch_quant.statistics.base import (
    CHANNELS,
    OBSERVERS,
    RANGE,
    STATISTICS,
    Observer,
    Statistic,
    observer_class,
    register_statistic,
    statistic_class,
)
from torch_quant.statistics.defaults import DEFAULT_OBSERVER
from torch_quant.statistics.entropy import EntropyObserver
from torch_quant.statistics.histogram import HistogramObserver
from torch_quant.statistics.minmax import MinMaxObserver
from torch_quant.statistics.moments import (
    HESSIAN,
    MEAN_SQUARE,
    ChannelMean,
    Hessian,
    MeanSquare,
    channel_mean,
)
from torch_quant.statistics.moving_average import MovingAverageObserver
from torch_quant.statistics.patches import Patches, patches
from torch_quant.statistics.percentile import PercentileObserver
from torch_quant.statistics.window_means import WindowMean, mean_of, window_mean

__all__ = [
    "CHANNELS",
    "HESSIAN",
    "MEAN_SQUARE",
    "RANGE",
    "OBSERVERS",
    "STATISTICS",
    "Observer",
    "Statistic",
    "observer_class",
    "register_statistic",
    "statistic_class",
    "ChannelMean",
    "EntropyObserver",
    "Hessian",
    "HistogramObserver",
    "MeanSquare",
    "MinMaxObserver",
    "MovingAverageObserver",
    "Patches",
    "PercentileObserver",
    "WindowMean",
    "DEFAULT_OBSERVER",
    "channel_mean",
    "from_ao",
    "mean_of",
    "patches",
    "window_mean",
]
