"""Weight methods and transforms, one a file. Importing this package registers them."""

from torch_quant.algorithms.gptq import GPTQ
from torch_quant.algorithms.hqq import HQQ
from torch_quant.algorithms.rtn import DEFAULT_METHOD, RoundToNearest
from torch_quant.algorithms.smoothquant import SmoothQuant

__all__ = ["DEFAULT_METHOD", "GPTQ", "HQQ", "RoundToNearest", "SmoothQuant"]
