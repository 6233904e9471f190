"""Weight methods and transforms, one a file. Importing this package registers them."""

from torch_quant.algorithms.rtn import DEFAULT_METHOD, RoundToNearest
from torch_quant.algorithms.smoothquant import SmoothQuant

__all__ = ["DEFAULT_METHOD", "RoundToNearest", "SmoothQuant"]
