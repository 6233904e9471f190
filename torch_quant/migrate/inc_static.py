"""Intel Neural Compressor's integers and small floats for activations: static, smooth, MX, FP8.

The names and defaults of the options are those of version 3.10,
``neural_compressor/torch/quantization/config.py``.
"""

from __future__ import annotations

from dataclasses import replace

from torch_quant import recipes
from torch_quant.algorithms import SmoothQuant
from torch_quant.config import QConfig
from torch_quant.core.granularity import PerGroup
from torch_quant.core.spec import FLOAT, QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.migrate.inc_schemes import is_float
from torch_quant.migrate.options import Options

__all__ = ["dynamic", "fp8", "mixed", "mx", "smooth", "static"]

_OBSERVERS = {"minmax": None, "kl": "entropy"}
_MX = {
    "int8": "int8",
    "int4": "int4",
    "int2": "int2",
    "fp8_e5m2": "float8_e5m2",
    "fp8_e4m3": "float8_e4m3fn",
    "fp6_e3m2": "float6_e3m2",
    "fp6_e2m3": "float6_e2m3",
    "fp4": "float4_e2m1",
    "fp4_e2m1": "float4_e2m1",
}


def _in_float(options: Options) -> bool:
    """Whether weight or activations are in float, which leaves the layer there."""
    weight, input = options.take("w_dtype", "int8", str), options.take("act_dtype", "uint8", str)
    names = ("w_dtype", "act_dtype")
    if is_float(weight) != is_float(input):
        options.rows.differs(
            options.entry(*names), "float", "products of integers want both to be integers"
        )
    elif is_float(weight):
        options.rows.same(options.entry(*names), "float")
    return is_float(weight) or is_float(input)


def _weight(options: Options, default: str) -> None:
    """The weight is int8, symmetric, per output channel: what all kernels take."""
    dtype = options.take("w_dtype", "int8", str)
    if dtype not in ("int8", "uint8"):
        raise InvalidConfig(f"{options.place}w_dtype is {dtype!r}; expected int8 or fp32")
    symmetric = options.take("w_sym", True, bool)
    granularity = options.take("w_granularity", default, str)
    algorithm = options.take("w_algo", "minmax", str)
    entry = options.entry("w_dtype", "w_sym", "w_granularity", "w_algo")
    here = "s8 symmetric per-channel"
    if granularity != "per_channel":
        options.rows.differs(entry, here, "a scale per output channel is finer, and costs nothing")
    elif not symmetric:
        options.rows.differs(entry, here, "kernels take symmetric weights")
    elif algorithm != "minmax":
        options.rows.differs(entry, here, "weights are covered whole")
    else:
        options.rows.same(entry, here)


def _int8(options: Options) -> QConfig | None:
    """Static int8: observers, and formats where they are not those of all backends."""
    options.no_effect([], "what stays in float is float32", "excluded_precisions")
    options.no_effect(None, "the model is captured here", "model_info")
    if _in_float(options):
        return None
    _weight(options, "per_channel")
    take, rows = options.take, options.rows
    signed = take("act_dtype", "uint8", str) == "int8"
    symmetric, algorithm = take("act_sym", False, bool), take("act_algo", "minmax", str)
    granularity = take("act_granularity", "per_tensor", str)
    if algorithm not in _OBSERVERS:
        expected = " or ".join(_OBSERVERS)
        raise InvalidConfig(f"{options.place}act_algo is {algorithm!r}; expected {expected}")
    # unsigned codes around 128 and signed ones around 0 are the same grid
    spec = QuantSpec.of(bits=8, signed=signed or symmetric, symmetric=symmetric)
    found = QConfig(observer=_OBSERVERS[algorithm])
    if spec != QuantSpec.of(bits=8):
        found = replace(found, input=spec)
    entry = options.entry("act_dtype", "act_sym", "act_granularity", "act_algo")
    here = f"{spec}, observer {_OBSERVERS[algorithm] or 'minmax'}"
    if granularity != "per_tensor":
        rows.differs(entry, here, "no kernel multiplies activations with a scale per channel")
    else:
        rows.same(entry, here)
    return found


def static(options: Options) -> QConfig | None:
    """Static int8."""
    return _int8(options)


def smooth(options: Options) -> QConfig | None:
    """SmoothQuant, then static int8."""
    take, rows = options.take, options.rows
    alpha = take("alpha", 0.5)
    tuned = ("init_alpha", "alpha_min", "alpha_max", "alpha_step", "shared_criterion")
    for name in (*tuned, "do_blockwise", "auto_alpha_args"):
        take(name, None)
    folding = take("folding", False, bool)
    options.no_effect(False, "layers that read one tensor always share scales", "scale_sharing")
    found = _int8(options)
    if found is None:
        return None
    if alpha == "auto":
        (transform,) = recipes.int8_static(correct_bias=False, row_scales=False).transforms
        why = "0.8 where it is predicted to help, in place of a search"
        rows.differs(options.entry("alpha"), str(transform), why)
        return replace(found, transforms=[transform])
    alpha = options.take("alpha", 0.5, float)
    if not 0 <= alpha <= 1:
        raise InvalidConfig(f"{options.place}alpha is {alpha}; expected 0 to 1, or 'auto'")
    transform = SmoothQuant(float(alpha))
    rows.same(options.entry("alpha"), str(transform))
    if folding:
        why = "inputs are scaled at each call, so layers that nothing can be folded into are too"
        rows.differs(options.entry("folding"), str(transform), why)
    return replace(found, transforms=[transform])


def dynamic(options: Options) -> QConfig | None:
    """Dynamic int8, per token."""
    if _in_float(options):
        return None
    _weight(options, "per_tensor")
    symmetric = options.take("act_sym", False, bool)
    signed = options.take("act_dtype", "uint8", str) == "int8"
    options.take("act_granularity", "per_tensor", str)
    options.take("act_algo", "kl", str)
    found = recipes.int8_dynamic(symmetric=symmetric or signed)
    options.rows.differs(
        options.entry("act_dtype", "act_sym", "act_granularity", "act_algo"),
        str(found.input),
        "a scale for each token, of its smallest and largest value: finer",
    )
    return found


def mx(options: Options) -> QConfig | None:
    """OCP microscaling formats."""
    take = options.take
    names = {which: take(f"{which}_dtype", "int8", str) for which in ("w", "act")}
    block, alone = take("blocksize", 32, int), take("weight_only", False, bool)
    options.no_effect("bfloat16", "results are float32", "out_dtype")
    if is_float(names["w"]):
        options.rows.same(options.entry("w_dtype"), "float")
        return None
    if block < 1:
        raise InvalidConfig(f"{options.place}blocksize is {block}; expected 1 or more")
    specs = {}
    alone = alone or is_float(names["act"])
    for which, name in names.items():
        if which == "act" and alone:
            continue
        if name not in _MX:
            known = ", ".join([*_MX, "fp32"])
            raise InvalidConfig(f"{options.place}{which}_dtype is {name!r}; expected {known}")
        specs[which] = QuantSpec.of(
            _MX[name],
            symmetric=True,
            granularity=PerGroup(block),
            scale_type="e8m0",
            dynamic=which == "act",
        )
    found = QConfig(specs.get("act", FLOAT), specs["w"])
    entry = options.entry("w_dtype", "act_dtype", "blocksize", "weight_only")
    here = f"weight {found.weight}, input {found.input}"
    if any(name.startswith("int") for name in names.values()):
        options.rows.differs(entry, here, "integers go down to -128, where the tool has a sign bit")
    else:
        options.rows.same(entry, here)
    method = take("round_method", "nearest", str)
    if method == "floor":
        options.rows.differs(options.entry("round_method"), "nearest", "no other is simulated")
    elif method != "even":
        why = "exact halves go to the even code, not away from 0"
        options.rows.differs(options.entry("round_method"), "even", why)
    return found


def mixed(options: Options) -> QConfig | None:
    """Products in half precision."""
    dtype = options.take("dtype", "fp16", str)
    if dtype not in ("fp16", "bf16", "fp32"):
        raise InvalidConfig(f"{options.place}dtype is {dtype!r}; expected bf16, fp16 or fp32")
    if dtype == "fp32":
        options.rows.same(options.entry("dtype"), "float")
        return None
    found = recipes.bfloat16()
    if dtype == "bf16":
        options.rows.same(options.entry("dtype"), "products in bfloat16")
    else:
        why = "CPUs have no products in float16"
        options.rows.differs(options.entry("dtype"), "products in bfloat16", why)
    return found


def fp8(options: Options) -> QConfig | None:
    """float8 with static scales; which layers, the caller reads."""
    elements = {"E4M3": "float8_e4m3fn", "E5M2": "float8_e5m2"}
    take = options.take
    element = take("fp8_config", "E4M3", str).upper()
    if element not in elements:
        raise InvalidConfig(f"{options.place}fp8_config is {element!r}; expected E4M3 or E5M2")
    found = recipes.float8(element=elements[element])
    options.rows.same(options.entry("fp8_config"), str(found.weight))
    method = take("scale_method", "maxabs_hw")
    options.rows.differs(
        options.entry("scale_method"),
        f"weight {found.weight}, input {found.input}",
        f"scales are float32 numbers of the largest value; {method} rounds and shares them "
        "as its accelerator wants",
    )
    take("observer", "maxabs")
    options.no_effect("bf16", "what stays in float is float32", "hp_dtype")
    options.left_out("scale_params", {}, "name layers in overrides")
    options.left_out("mod_dict", {}, "name layers in overrides")
    why = "how the tool measures and runs; here: calib, then quantize"
    for name, default in (
        ("dump_stats_path", "./hqt_output/measure"), ("mode", "AUTO"), ("fake_quant", "False"),
        ("measure_exclude", "OUTPUT"), ("use_qdq", "False"), ("scale_format", "scalar"),
        ("measure_on_hpu", True),
    ):  # fmt: skip
        options.no_effect(default, why, name)
    return found
