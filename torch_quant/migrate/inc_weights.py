"""Intel Neural Compressor's methods for weights alone: RTN, GPTQ, AWQ, TEQ, AutoRound, HQQ.

The names and defaults of the options are those of version 3.10,
``neural_compressor/torch/quantization/config.py``.
"""

from __future__ import annotations

import re
from typing import Any

from torch_quant.algorithms import AWQ, GPTQ, HQQ, TEQ, AutoRound, RoundToNearest
from torch_quant.config import QConfig
from torch_quant.core.granularity import Granularity, PerChannel, PerGroup
from torch_quant.core.methods import Transform, WeightMethod
from torch_quant.core.spec import FLOAT, QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.migrate.inc_schemes import is_float, scheme_of
from torch_quant.migrate.options import Options

__all__ = ["autoround", "awq", "gptq", "hqq", "rtn", "teq"]

_LAYERWISE = "how the tool saves memory; capture by modules does so here"
_FLOATS = {
    "fp4_e2m1": "float4_e2m1",
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "fp8_e4m3fnuz": "float8_e4m3fn",
    "fp8_e5m2fnuz": "float8_e5m2",
}


def _granularity(options: Options, default: int) -> Granularity:
    size = options.take("group_size", default, int)
    if size != -1 and size < 1:
        raise InvalidConfig(f"{options.place}group_size is {size}; expected -1, or 1 and more")
    return PerChannel() if size == -1 else PerGroup(size)


def _spec(options: Options, group: int = 32) -> QuantSpec | None:
    """The format of the weight, None for float."""
    dtype = options.take("dtype", "int", str).lower()
    bits, symmetric = options.take("bits", 4, int), options.take("use_sym", True, bool)
    granularity = _granularity(options, group)
    entry = options.entry("dtype", "bits", "use_sym", "group_size")
    if is_float(dtype):
        options.rows.same(options.entry("dtype"), "float")
        return None
    if named := re.fullmatch(r"int(\d)", dtype):
        bits = int(named[1])
    if dtype in _FLOATS:
        found = QuantSpec.of(_FLOATS[dtype], granularity=granularity)
        if dtype == "fp4_e2m1":
            options.rows.same(entry, str(found))
        else:
            options.rows.differs(entry, str(found), "the tool casts without scales")
        return found
    if dtype in ("nf4", "fp4", "fp4_e2m1_bnb"):
        found = QuantSpec.of("int4", granularity=granularity)
        why = f"there is no {dtype} here: its 16 values are no grid that kernels have"
        options.rows.differs(entry, str(found), why)
        return found
    if dtype != "int" and not named:
        raise InvalidConfig(
            f"{options.place}dtype is {dtype!r}; expected int, int2 to int8, fp32, nf4, fp4, "
            f"{', '.join(_FLOATS)}"
        )
    if bits not in range(1, 9):
        raise InvalidConfig(f"{options.place}bits is {bits}; expected 1 to 8")
    found = QuantSpec.of(
        bits=max(bits, 2), signed=symmetric, symmetric=symmetric, granularity=granularity
    )
    if bits == 1:
        options.rows.differs(entry, str(found), "integers have 2 bits or more here")
    else:
        options.rows.same(entry, str(found))
    return found


def _common(options: Options) -> None:
    """Options that all of these share."""
    doubled = options.take("use_double_quant", False, bool)
    for name in ("dtype", "bits", "use_sym", "group_size"):
        options.take(f"double_quant_{name}", None)
    if doubled:
        options.rows.left_out(
            options.entry("use_double_quant"),
            "scales stay as they are, which is more exact and takes more memory",
        )
    if options.take("group_dim", 1, int) != 1:
        options.rows.differs(
            options.entry("group_dim"), "groups along the inputs", "no kernel has others"
        )
    options.no_effect(options.take("use_layer_wise", False), _LAYERWISE, "use_layer_wise")
    options.no_effect("", _LAYERWISE, "model_path")
    options.no_effect(False, _LAYERWISE, "use_block_wise")
    options.take("quant_lm_head", False, bool)  # the caller's


def _full_range(options: Options, spec: QuantSpec, name: str = "use_full_range") -> bool:
    full: bool = options.take(name, False, bool)
    if full and not (spec.integer and spec.symmetric):
        options.rows.no_effect(options.entry(name), "it is for symmetric integers")
        return False
    return full


def _nearest(options: Options, spec: QuantSpec) -> WeightMethod | None:
    """Round to nearest, as the options of the range have it."""
    full, search = _full_range(options, spec), options.take("use_mse_search", False, bool)
    if search:
        options.rows.differs(
            options.entry("use_mse_search"),
            "RoundToNearest(clip_search=True)",
            "the search is for each group, where the tool has one ratio for the layer",
        )
    if full:
        options.rows.same(options.entry("use_full_range"), "RoundToNearest(full_range=True)")
    return RoundToNearest(clip_search=search, full_range=full) if full or search else None


def rtn(options: Options) -> QConfig | None:
    """Round to nearest."""
    spec = _spec(options)
    _common(options)
    method = None if spec is None else _nearest(options, spec)
    return None if spec is None else QConfig(FLOAT, spec, method=method)


def gptq(options: Options) -> QConfig | None:
    """GPTQ."""
    spec = _spec(options)
    _common(options)
    take, rows = options.take, options.rows
    order, static = take("act_order", False, bool), take("static_groups", False, bool)
    method = GPTQ(
        block_size=take("block_size", 2048, int),
        act_order=order,
        damping=float(take("percdamp", 0.01, float)),
        static_groups=static or order,
        clip_search=take("use_mse_search", False, bool),
        sequential=take("true_sequential", False, bool),
    )
    options.left_out("hybrid_order", False, "columns go in the order of their inputs, or as is")
    options.left_out("fp8_aware", False, "scales are not rounded to float8")
    if spec is None:
        return None
    names = ("act_order", "percdamp", "block_size", "static_groups", "true_sequential")
    if order and not static:
        why = "with act_order, the scales of groups are chosen before, here"
        rows.differs(options.entry(*names), str(method), why)
    else:
        rows.same(options.entry(*names), str(method))
    return QConfig(FLOAT, spec, method=method)


def awq(options: Options) -> QConfig | None:
    """AWQ, before round to nearest."""
    spec = _spec(options)
    _common(options)
    take, rows = options.take, options.rows
    scale, clip = take("use_auto_scale", True, bool), take("use_auto_clip", True, bool)
    folding = take("folding", False, bool)
    options.left_out(
        "absorb_layer_dict", {}, "what takes the inverse of a scale is found by numbers"
    )
    if spec is None:
        return None
    transforms: list[Transform] = [AWQ(scale=scale, clip=clip)] if scale or clip else []
    why = (
        "" if folding else "a layer is scaled where one before it takes the inverse, as by folding"
    )
    note = rows.same if folding else rows.differs
    arguments = (why,) if why else ()
    entry = options.entry("use_auto_scale", "use_auto_clip", "folding")
    note(entry, ", ".join(map(str, transforms)) or "no AWQ", *arguments)
    return QConfig(FLOAT, spec, transforms=transforms, method=_nearest(options, spec))


def teq(options: Options) -> QConfig | None:
    """TEQ, before round to nearest."""
    spec = _spec(options)
    _common(options)
    folding = options.take("folding", True, bool)
    options.left_out("absorb_to_layer", {}, "what takes the inverse of a scale is found by numbers")
    if spec is None:
        return None
    method: Transform = TEQ()
    if folding:
        options.rows.same(options.entry("folding"), str(method))
    else:
        why = "a layer is scaled where one before it takes the inverse, as by folding"
        options.rows.differs(options.entry("folding"), str(method), why)
    return QConfig(FLOAT, spec, transforms=[method], method=_nearest(options, spec))


def hqq(options: Options) -> QConfig | None:
    """HQQ, in its own format: float zero points."""
    dtype, bits = options.take("dtype", "int", str), options.take("bits", 4, int)
    granularity = _granularity(options, 64)
    options.take("quant_lm_head", False, bool)
    zeros, scales = options.take("quant_zero", True, bool), options.take("quant_scale", False, bool)
    options.take("scale_quant_group_size", 128)
    if is_float(dtype):
        options.rows.same(options.entry("dtype"), "float")
        return None
    if bits not in range(2, 9):
        raise InvalidConfig(f"{options.place}bits is {bits}; expected 2 to 8")
    spec = QuantSpec.of(bits=bits, symmetric=False, granularity=granularity, float_zero_points=True)
    why = "of 20 rounds the best; the tool stops early and rounds zero points of 4 bits"
    options.rows.differs(options.entry("bits", "group_size"), f"{spec}, {HQQ()}", why)
    if zeros or scales:
        options.rows.left_out(
            options.entry("quant_zero", "quant_scale"),
            "zero points and scales stay in float32, which is more exact and takes more memory",
        )
    return QConfig(FLOAT, spec, method=HQQ())


_DATA = "what data there are is up to round_weights(model, batches)"
_DEVICE = "how and where the tool computes"
_AUTOROUND_NO_EFFECT: tuple[tuple[str, Any, str], ...] = (
    ("seqlen", 2048, _DATA), ("nsamples", 128, _DATA), ("sampler", "rand", _DATA),
    ("extra_data_dir", None, _DATA), ("truncation", False, _DATA), ("amp", True, _DEVICE),
    ("low_gpu_mem_usage", False, _DEVICE), ("enable_torch_compile", False, _DEVICE),
    ("device_map", 0, _DEVICE), ("output_dir", "./tmp_auto_round", _DEVICE),
    ("export_format", "auto_round", "export_checkpoint writes checkpoints here"),
    ("use_layer_wise", True, _LAYERWISE), ("dynamic_max_gap", -1, _DEVICE),
)  # fmt: skip
_AUTOROUND_LEFT_OUT: tuple[tuple[str, Any, str], ...] = (
    ("nblocks", 1, "blocks are rounded one by one"),
    ("gradient_accumulate_steps", 1, "a larger batch_size does the same"),
    ("not_use_best_mse", False, "the best state is taken, not the last"),
    ("lr_scheduler", None, "the rate falls to 0 along a line"),
    ("enable_adam", False, "signed gradient descent alone"),
    ("enable_norm_bias_tuning", False, "norms and biases stay as they are"),
    ("super_bits", None, "scales are not quantized"),
    ("super_group_size", None, "scales are not quantized"),
    ("to_quant_block_names", None, "give module_filter=ModuleFilter(include_names=[...])"),
    ("quant_nontext_module", False, "give module_filter=ModuleFilter(include_names=[...])"),
    ("target_bits", None, "quantizer.allocate(amp_model, bits_per_weight=...) does that"),
    ("shared_layers", None, "quantizer.allocate groups layers that share a weight"),
    ("auto_scheme_batch_size", None, "quantizer.allocate chooses formats"),
    ("auto_scheme_device_map", None, "quantizer.allocate chooses formats"),
    ("auto_scheme_method", "default", "quantizer.allocate chooses formats"),
    ("ignore_scale_zp_bits", False, "quantizer.allocate counts scales"),
)


def autoround(options: Options) -> QConfig | None:
    """AutoRound, by its scheme and what goes before it."""
    take, rows = options.take, options.rows
    found = scheme_of(options)
    take("options", None)
    take("quant_lm_head", False, bool)
    for name, default, why in _AUTOROUND_NO_EFFECT:
        options.no_effect(default, why, name)
    for name, default, why in _AUTOROUND_LEFT_OUT:
        options.left_out(name, default, why)
    rate, ends = take("lr", None, float), take("minmax_lr", None, float)
    names = ("iters", "batch_size", "lr", "minmax_lr", "enable_minmax_tuning", "seed")
    full = take("enable_full_range", False, bool)
    iterations, size = take("iters", 200, int), take("batch_size", 8, int)
    ranges, seed = take("enable_minmax_tuning", True, bool), take("seed", 42, int)
    if not take("enable_quanted_input", True, bool):
        rows.differs(
            options.entry("enable_quanted_input"),
            "inputs from the rounded blocks before",
            "later blocks make up for what earlier ones lost",
        )
    if found is None:
        return None
    activations, spec = found
    integers = spec.integer and spec.symmetric
    if iterations == 0:
        rows.same(options.entry("iters"), "rtn", "no step is taken")
        method: WeightMethod | None = RoundToNearest(full_range=True) if full and integers else None
        return QConfig(activations, spec, method=method)
    method = AutoRound(
        iterations=iterations,
        batch_size=size,
        learning_rate=None if rate is None else float(rate),
        range_learning_rate=None if ends is None else float(ends),
        ranges=ranges,
        full_range=full and integers,
        seed=seed,
    )
    rows.differs(
        options.entry(*names), str(method), "it begins with the ranges of least squared error"
    )
    return QConfig(activations, spec, method=method)
