"""Stand-ins for the float model: same inputs, same outputs, and they learn from what passes."""

from torch_quant.proxies.amp import AmpModel, Latency
from torch_quant.proxies.amp_options import AmpOptions, LossFn
from torch_quant.proxies.base import Proxy, Tied
from torch_quant.proxies.calib import CalibModel

__all__ = ["AmpModel", "AmpOptions", "CalibModel", "Latency", "LossFn", "Proxy", "Tied"]
