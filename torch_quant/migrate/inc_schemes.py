"""The formats of AutoRound's schemes, and what Intel Neural Compressor calls float."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch_quant.core.granularity import Granularity, PerChannel, PerGroup, PerToken
from torch_quant.core.spec import FLOAT, FloatFormat, QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.migrate.options import Options

__all__ = ["is_float", "scheme_of"]


def _integers(bits: int, group: int = 128) -> dict[str, Any]:
    return {"bits": bits, "group_size": group, "use_sym": True, "dtype": "int", "act_bits": 16}


def _mx(bits: int, act_bits: int) -> dict[str, Any]:
    return {
        "bits": bits, "group_size": 32, "use_sym": True, "dtype": "mx_fp", "act_bits": act_bits,
        "act_group_size": 32, "act_dtype": "mx_fp", "act_dynamic": True, "act_sym": True,
    }  # fmt: skip


_SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16": _integers(4),
    "W3A16": _integers(3),
    "W2A16": _integers(2),
    "W8A16": _integers(8),
    "W2A16G64": _integers(2, 64),
    "W2A16G32": _integers(2, 32),
    "MXFP4": _mx(4, 4),
    "MXFP8": _mx(8, 8),
    "MXFP4_RCEIL": _mx(4, 4),
    "NVFP4": {**_mx(4, 4), "group_size": 16, "act_group_size": 16, "dtype": "nv_fp"},
    "INT8_W8A8": {**_integers(8, -1), "act_bits": 8, "act_dtype": "int", "act_dynamic": True},
}
"""AutoRound's names for sets of options (``auto_round/schemes.py``)."""
_FIELDS: dict[str, type] = {
    "bits": int, "group_size": int, "use_sym": bool, "dtype": str, "act_bits": int,
    "act_group_size": int, "act_sym": bool, "act_dtype": str, "act_dynamic": bool,
}  # fmt: skip
_MX_ELEMENTS = {4: "float4_e2m1", 8: "float8_e4m3fn"}


def is_float(dtype: str) -> bool:
    """Whether a name of the tool leaves a layer in float.

    >>> is_float("fp32"), is_float("int")
    (True, False)
    """
    return dtype.lower() in ("fp32", "float32", "float", "fp16", "float16", "bf16", "bfloat16")


def scheme_of(options: Options) -> tuple[QuantSpec | FloatFormat, QuantSpec] | None:
    """The formats of activations and weights that AutoRound's options ask for, None for float.

    Raises:
        InvalidConfig: the scheme, or a number of bits, is unknown, or a value is of another kind.
    """
    given = options.take("scheme", "W4A16", (str, dict))
    explicit = {name: options.take(name, None, kind) for name, kind in _FIELDS.items()}
    scale = options.take("scale_dtype", "fp16", str)
    named: Mapping[str, Any]
    if isinstance(given, dict):
        renamed = {"sym": "use_sym", "data_type": "dtype", "act_data_type": "act_dtype"}
        read = {renamed.get(str(key), str(key)): value for key, value in given.items()}
        inner = Options(read, f"{options.place}scheme: ", options.rows)
        named = {name: inner.take(name, None, kind) for name, kind in _FIELDS.items()}
        named = {name: value for name, value in named.items() if value is not None}
        inner.finish()
        if "bits" in read and "bits" not in named:
            raise InvalidConfig(f"{inner.place}bits is null; expected 2 to 8, or 16 for float")
    else:
        if given.upper() not in _SCHEMES:
            raise InvalidConfig(
                f"{options.place}scheme is {given!r}; expected one of {', '.join(_SCHEMES)}: give "
                "bits, group_size and use_sym in its place"
            )
        named = _SCHEMES[given.upper()]
    values = {**named, **{key: value for key, value in explicit.items() if value is not None}}
    entry = options.entry("scheme", *(key for key, value in explicit.items() if value is not None))
    dtype, bits = str(values.get("dtype", "int")), values.get("bits", 4)
    if is_float(dtype) or bits >= 16:
        options.rows.same(entry, "float")
        return None
    if bits not in range(2, 9):
        raise InvalidConfig(f"{options.place}bits is {bits}; expected 2 to 8")
    if dtype.startswith(("mx_fp", "nv_fp", "fp")):
        weight = _float(options, values, "", dtype, bits)
    else:
        types = {"fp16": "float16", "bf16": "bfloat16"}
        symmetric = bool(values.get("use_sym", True))
        weight = QuantSpec.of(
            bits=bits,
            signed=symmetric,
            symmetric=symmetric,
            granularity=_groups(values.get("group_size", 128)),
            scale_type=types.get(scale, "float32"),
        )
    activations = _activations(options, values)
    here = f"weight {weight}, input {activations}"
    if dtype.startswith("nv_fp"):
        options.rows.differs(entry, here, "scales are float32, where NVFP4 has float8 and a second")
    else:
        options.rows.same(entry, here)
    return activations, weight


def _groups(size: int) -> Granularity:
    return PerChannel() if size in (-1, 0) else PerGroup(size)


def _float(
    options: Options, values: Mapping[str, Any], which: str, dtype: str, bits: int
) -> QuantSpec:
    """A format of small floats, of the weight or (``"act_"``) of the activations."""
    if bits not in _MX_ELEMENTS:
        raise InvalidConfig(f"{options.place}{which}bits is {bits} of {dtype}; expected 4 or 8")
    size = values.get(f"{which}group_size", 32)
    groups = PerToken() if which and size in (-1, 0, None) else _groups(size)
    return QuantSpec.of(
        _MX_ELEMENTS[bits],
        granularity=groups,
        scale_type="e8m0" if dtype.startswith("mx") else "float32",
        dynamic=bool(which),
    )


def _activations(options: Options, values: Mapping[str, Any]) -> QuantSpec | FloatFormat:
    bits = values.get("act_bits", 16)
    if bits is None or bits >= 16:
        return FLOAT
    dtype = str(values.get("act_dtype") or values.get("dtype", "int"))
    if not values.get("act_dynamic", True):
        options.rows.differs(
            options.entry("act_dynamic"),
            "scales at each call",
            "round_weights records no ranges of activations",
        )
    if dtype.startswith(("mx_fp", "nv_fp", "fp")):
        return _float(options, values, "act_", dtype, bits)
    if bits != 8:
        raise InvalidConfig(f"{options.place}act_bits is {bits}; expected 8, or 16 for float")
    return QuantSpec.of("int8", granularity=PerToken(), dynamic=True)
