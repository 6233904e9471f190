"""Quantize PyTorch models and run them on real int8 kernels."""

import contextlib
import importlib
import sys

from torch_quant import recipes
from torch_quant.algorithms import (
    AWQ,
    GPTQ,
    HQQ,
    TEQ,
    AdaRound,
    AutoRound,
    BiasCorrection,
    OutlierSplit,
    RoundToNearest,
    RowScales,
    SmoothQuant,
)
from torch_quant.amp.ranking import Sensitivity
from torch_quant.autotuning import autotune
from torch_quant.backends import Backend, available_backends
from torch_quant.checkpoints import export_checkpoint, load_checkpoint, quantize_checkpoint
from torch_quant.config import QConfig, SiteInfo, register_recipe
from torch_quant.core.element_type import ElementType
from torch_quant.core.elements import IntegerType, register_element_type
from torch_quant.core.float_type import FloatType
from torch_quant.core.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
)
from torch_quant.core.logs import name_messages
from torch_quant.core.methods import (
    Transform,
    WeightMethod,
    register_transform,
    register_weight_method,
)
from torch_quant.core.metrics import cosine, sqnr
from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.core.spec import BFLOAT16, FLOAT, QuantSpec, ScaleType
from torch_quant.errors import (
    BackendUnavailable,
    CaptureFailed,
    InvalidConfig,
    NotCalibrated,
    QuantError,
    UnsupportedOp,
)
from torch_quant.io.inductor import export_inductor
from torch_quant.io.onnx import export_onnx
from torch_quant.io.saving import load, save
from torch_quant.io.torchscript import export_torchscript
from torch_quant.module_filter import ModuleFilter
from torch_quant.qat.distillation import Distillation
from torch_quant.qat.methods import QatMethod, register_qat_method
from torch_quant.qat.schedule import QatSchedule, detect_nonfinite, switch
from torch_quant.quantizer import Quantizer
from torch_quant.tuning import tune
from torch_quant.version import __version__

__all__ = [
    "AWQ",
    "BFLOAT16",
    "FLOAT",
    "GPTQ",
    "HQQ",
    "TEQ",
    "AdaRound",
    "AutoRound",
    "BiasCorrection",
    "Backend",
    "BackendUnavailable",
    "CaptureFailed",
    "Distillation",
    "ElementType",
    "FloatType",
    "Granularity",
    "IntegerType",
    "InvalidConfig",
    "ModuleFilter",
    "NotCalibrated",
    "OutlierSplit",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QConfig",
    "QatMethod",
    "QatSchedule",
    "QuantError",
    "QuantPlan",
    "QuantSpec",
    "Quantizer",
    "RoundToNearest",
    "RowScales",
    "ScaleType",
    "Sensitivity",
    "SiteInfo",
    "SitePlan",
    "SmoothQuant",
    "Transform",
    "UnsupportedOp",
    "WeightMethod",
    "__version__",
    "available_backends",
    "autotune",
    "cosine",
    "detect_nonfinite",
    "export_checkpoint",
    "export_inductor",
    "export_onnx",
    "export_torchscript",
    "load",
    "load_checkpoint",
    "quantize_checkpoint",
    "recipes",
    "register_element_type",
    "register_qat_method",
    "register_recipe",
    "register_transform",
    "register_weight_method",
    "save",
    "sqnr",
    "switch",
    "tune",
]

name_messages()

if "transformers.quantizers.auto" in sys.modules:  # else, whoever wants it imports it
    with contextlib.suppress(ImportError):  # a version without third parties
        importlib.import_module("torch_quant.integrations.transformers")
