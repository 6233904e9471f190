"""Weight methods and transforms, one a file. Importing this package registers them."""

from torch_quant.algorithms.adaround import AdaRound
from torch_quant.algorithms.autoround import AutoRound
from torch_quant.algorithms.awq import AWQ
from torch_quant.algorithms.bias_correction import BiasCorrection
from torch_quant.algorithms.gptq import GPTQ
from torch_quant.algorithms.hqq import HQQ
from torch_quant.algorithms.outlier_split import OutlierSplit
from torch_quant.algorithms.row_scales import RowScales
from torch_quant.algorithms.rtn import DEFAULT_METHOD, RoundToNearest, without_data
from torch_quant.algorithms.smoothquant import SmoothQuant
from torch_quant.algorithms.teq import TEQ

__all__ = [
    "AWQ",
    "DEFAULT_METHOD",
    "GPTQ",
    "HQQ",
    "TEQ",
    "AdaRound",
    "AutoRound",
    "BiasCorrection",
    "OutlierSplit",
    "RoundToNearest",
    "RowScales",
    "SmoothQuant",
    "without_data",
]
