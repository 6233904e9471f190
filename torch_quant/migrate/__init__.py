"""Settings and ranges of other tools as those of this package, with a report of what differs.

``from_inc`` reads Intel Neural Compressor, ``from_torch_ao`` PyTorch's own ``QConfigMapping`` and
its quantizers, ``from_ipex`` summaries of IPEX, ``from_onnx`` the ranges of a quantized ONNX file.
Each gives a :class:`Migration`.
"""

from torch_quant.migrate.inc import from_inc
from torch_quant.migrate.ipex import from_ipex
from torch_quant.migrate.onnx import from_onnx
from torch_quant.migrate.result import Migration, Outcome, Row
from torch_quant.migrate.torch_ao import from_torch_ao

__all__ = ["Migration", "Outcome", "Row", "from_inc", "from_ipex", "from_onnx", "from_torch_ao"]
