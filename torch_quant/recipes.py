"""Named configurations: what to quantize to, in a word.

A recipe gives a :class:`QConfig`, which says no more than the function's name and arguments do:
``Quantizer(recipes.int4_weight_only(group_size=64))``. In a configuration file it stands by
its name: ``qconfig: {recipe: int4_weight_only, group_size: 64}``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch_quant.algorithms import (
    GPTQ,
    AdaRound,
    AutoRound,
    BiasCorrection,
    OutlierSplit,
    RoundToNearest,
    RowScales,
    SmoothQuant,
)
from torch_quant.config import QConfig, register_recipe
from torch_quant.core.granularity import PerChannel, PerGroup, PerToken
from torch_quant.core.methods import Transform, WeightMethod, read_weight_method
from torch_quant.core.naming import did_you_mean
from torch_quant.core.spec import BFLOAT16, FLOAT, QuantSpec
from torch_quant.errors import InvalidConfig

__all__ = [
    "bfloat16",
    "fast",
    "float8",
    "int4_weight_only",
    "int8_dynamic",
    "int8_static",
    "int8_weight_only",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "mxint8",
    "weight_only",
]

_WORTH = 1.25
"""By what factor smoothing has to lower the noise of a layer to be worth a product at each call;
copies of channels, which take a row of a weight each, too."""
_BLOCK = 32
"""Elements that share a scale ("OCP Microscaling Formats (MX) Specification", version 1.0)."""


@register_recipe
def int8_static(
    *,
    smooth: float | Literal["auto"] | None = "auto",
    correct_bias: bool = True,
    row_scales: bool = True,
    observer: str | None = None,
    method: WeightMethod | str | None = None,
) -> QConfig:
    """int8 weights and activations, with scales from calibration: the default.

    ``method="gptq"`` is more accurate, for convolutions with few inputs by far; calibration takes
    up to twice as long then, and the quantized model the same time.

    Args:
        smooth: SmoothQuant's alpha, 0 to 1, for every linear layer; ``"auto"`` for 0.8 where it is
            predicted to lower the noise of rounding by a fifth or more, as in most layers of a
            transformer, or copies of the largest channels (:class:`OutlierSplit`) where these
            lower it more and the layer before can compute them; None leaves both out.
        correct_bias: take what rounding a weight adds to the mean of an output off the bias, see
            :class:`BiasCorrection`; it costs nothing at run time.
        row_scales: round attention's probabilities on a scale for each row where the backend's
            kernel does that at no cost, see :class:`RowScales`.
        observer: name of the statistics taken of activations.
        method: how weights are rounded; None for round to nearest.

    Raises:
        InvalidConfig: ``smooth`` is none of these, a switch is no bool, or the observer or
            the method is unknown.

    >>> print(int8_static().transforms[0])
    smoothquant(alpha=0.8, min_gain=1.25)
    """
    if isinstance(smooth, str) and smooth != "auto":
        raise InvalidConfig(
            f'smooth={smooth!r}: expected "auto", None or a number from 0 to 1'
            f"{did_you_mean(smooth, ['auto'])}"
        )
    for name, switch in (("correct_bias", correct_bias), ("row_scales", row_scales)):
        if not isinstance(switch, bool):
            raise InvalidConfig(f"{name}={switch!r}: expected True or False")
    transforms: list[Transform] = []
    if isinstance(smooth, str):
        transforms = [SmoothQuant(0.8, min_gain=_WORTH), OutlierSplit(min_gain=_WORTH)]
    elif smooth is not None:
        transforms = [SmoothQuant(smooth)]
    if correct_bias:
        transforms.append(BiasCorrection(always=False))
    if row_scales:
        transforms.append(RowScales())
    return QConfig(observer=observer, transforms=transforms, method=_method(method))


@register_recipe
def fast() -> QConfig:
    """:func:`int8_static` without smoothing, corrections and scales for rows: the least to record.

    >>> fast() == int8_static(smooth=None, correct_bias=False, row_scales=False) == QConfig()
    True
    """
    return QConfig()


@register_recipe
def bfloat16() -> QConfig:
    """Products in bfloat16, what lies between them in float32: no data, and no scales.

    Operands, weights, biases and results of products, rows of embedding tables, and what LSTM and
    GRU compute with are rounded to 8 bits of precision with float32's range, so nothing overflows;
    sums inside a product are float32. It pays on CPUs with bfloat16 products (AVX512-BF16, AMX,
    Arm's BF16), for what int8 hurts: ``overrides={"op:linear": "int8_static"}`` has these in int8
    beside it, and ``fallback(..., dtype=torch.bfloat16)`` takes the most sensitive layers to it.

    >>> bfloat16()
    QConfig(input=BFLOAT16, weight=BFLOAT16, observer=None, transforms=(), method=None)
    """
    return QConfig(BFLOAT16, BFLOAT16)


@register_recipe
def int8_dynamic(*, symmetric: bool = False, method: WeightMethod | str | None = None) -> QConfig:
    """int8 weights, and activations with a scale for each token, chosen at each call: no data.

    Args:
        symmetric: whether activations are signed, with their zero at 0.
        method: how weights are rounded.

    >>> int8_dynamic().input.dynamic
    True
    """
    element = "int8" if symmetric else "uint8"
    tokens = QuantSpec.of(element, granularity=PerToken(), dynamic=True)
    return QConfig(tokens, _int(8, None), method=_method(method))


@register_recipe
def int8_weight_only(
    *, group_size: int | None = None, method: WeightMethod | str | None = None
) -> QConfig:
    """int8 weights, activations in float: no data.

    Args:
        group_size: inputs that share a scale; None for a scale for each output channel.
        method: how weights are rounded.

    >>> print(int8_weight_only().weight)
    s8 symmetric per-channel
    """
    return QConfig(FLOAT, _int(8, group_size), method=_method(method))


@register_recipe
def int4_weight_only(
    *,
    group_size: int | None = 128,
    symmetric: bool = True,
    method: WeightMethod | str | None = None,
    float_zero_points: bool = False,
) -> QConfig:
    """int4 weights, activations in float: no data unless the method wants some.

    Args:
        group_size: inputs that share a scale; None for a scale for each output channel.
        symmetric: whether codes are signed, with their zero at 0.
        method: how weights are rounded; None for round to nearest. What is given by its name
            uses the full range where codes are signed.
        float_zero_points: with ``symmetric=False``, as HQQ has them.

    Raises:
        InvalidConfig: ``group_size`` is not positive, or the method is unknown; float zero points
            in a symmetric format.

    >>> print(int4_weight_only(group_size=32).weight)
    s4 symmetric per-group(32)
    """
    spec = _int(4, group_size, symmetric, float_zero_points)
    return QConfig(FLOAT, spec, method=_few_bits(4, symmetric, method))


@register_recipe
def weight_only(
    *,
    bits: int = 4,
    group_size: int | None = 64,
    symmetric: bool = True,
    method: WeightMethod | str | None = None,
    float_zero_points: bool = False,
) -> QConfig:
    """Weights of 2 to 8 bits, activations in float: no data unless the method wants some.

    Args:
        bits: of a weight.
        group_size: inputs that share a scale; None for a scale for each output channel.
        symmetric: whether codes are signed, with their zero at 0.
        method: how weights are rounded; None for round to nearest. What is given by its name
            uses the full range where codes are signed and have up to 4 bits.
        float_zero_points: with ``symmetric=False``, as HQQ has them.

    Raises:
        InvalidConfig: ``bits`` or ``group_size`` is out of range, or the method is unknown; float
            zero points in a symmetric format.

    >>> print(weight_only(bits=3).weight)
    s3 symmetric per-group(64)
    """
    if isinstance(bits, bool) or bits not in range(2, 9):
        raise InvalidConfig(f"bits={bits!r}: expected 2 to 8")
    how = _few_bits(bits, symmetric, method)
    return QConfig(FLOAT, _int(bits, group_size, symmetric, float_zero_points), method=how)


@register_recipe
def float8(*, element: str = "float8_e4m3fn", dynamic: bool = False) -> QConfig:
    """float8 weights per output channel, and activations per tensor or, if dynamic, per token.

    Args:
        element: ``"float8_e4m3fn"`` or ``"float8_e5m2"``.
        dynamic: whether the scales of activations are chosen at each call: no data then.

    >>> float8(dynamic=True).input.granularity
    PerToken()
    """
    _check(element, ("float8_e4m3fn", "float8_e5m2"))
    weight = QuantSpec.of(element, per_channel=True)
    if not dynamic:
        return QConfig(QuantSpec.of(element), weight)
    return QConfig(QuantSpec.of(element, granularity=PerToken(), dynamic=True), weight)


@register_recipe
def mxfp8(*, element: str = "float8_e4m3fn", weight_only: bool = False) -> QConfig:
    """MXFP8: float8 in blocks of 32 along the inputs, with scales that are powers of two; no data.

    Args:
        element: ``"float8_e4m3fn"`` or ``"float8_e5m2"``.
        weight_only: whether activations stay in float.

    >>> mxfp8().weight.scale_type
    <ScaleType.E8M0: 'e8m0'>
    """
    _check(element, ("float8_e4m3fn", "float8_e5m2"))
    return _mx(element, weight_only)


@register_recipe
def mxfp6(*, element: str = "float6_e2m3", weight_only: bool = False) -> QConfig:
    """MXFP6, as :func:`mxfp8`: ``"float6_e2m3"`` or ``"float6_e3m2"``.

    >>> mxfp6(weight_only=True).input
    FLOAT
    """
    _check(element, ("float6_e2m3", "float6_e3m2"))
    return _mx(element, weight_only)


@register_recipe
def mxfp4(*, weight_only: bool = False) -> QConfig:
    """MXFP4, as :func:`mxfp8`, of ``float4_e2m1``.

    >>> mxfp4().input.granularity
    PerGroup(size=32, axis=None)
    """
    return _mx("float4_e2m1", weight_only)


@register_recipe
def mxint8(*, weight_only: bool = False) -> QConfig:
    """MXINT8, as :func:`mxfp8`, of ``int8``.

    >>> mxint8().weight.element.name
    'int8'
    """
    return _mx("int8", weight_only)


def _check(element: str, known: tuple[str, ...]) -> None:
    if element not in known:
        raise InvalidConfig(
            f"element={element!r}: expected {' or '.join(map(repr, known))}"
            f"{did_you_mean(str(element), known)}"
        )


def _int(
    bits: int, group_size: int | None, symmetric: bool = True, float_zero_points: bool = False
) -> QuantSpec:
    granularity = PerChannel() if group_size is None else PerGroup(group_size)
    return QuantSpec.of(
        bits=bits,
        signed=symmetric,
        symmetric=symmetric,
        granularity=granularity,
        float_zero_points=float_zero_points,
    )


def _mx(element: str, weight_only: bool) -> QConfig:
    block = PerGroup(_BLOCK)
    weight = QuantSpec.of(element, symmetric=True, granularity=block, scale_type="e8m0")
    if weight_only:
        return QConfig(FLOAT, weight)
    dynamic = QuantSpec.of(
        element, symmetric=True, granularity=block, scale_type="e8m0", dynamic=True
    )
    return QConfig(dynamic, weight)


def _few_bits(bits: int, symmetric: bool, method: WeightMethod | str | None) -> WeightMethod | None:
    """Of up to 4 symmetric bits, methods by name use the full range, as round to nearest does.

    The largest weight of a group is then the code that has no positive counterpart, by the sign of
    its scale: one level more of 15, or of 7.
    """
    if not symmetric or bits > 4:
        return _method(method)
    if method is None:
        return RoundToNearest(full_range=True)
    found = _method(method)
    if isinstance(method, str) and isinstance(found, AdaRound | AutoRound | GPTQ | RoundToNearest):
        return replace(found, full_range=True)
    return found


def _method(method: WeightMethod | str | None) -> WeightMethod | None:
    if method is None or isinstance(method, WeightMethod):
        return method
    if not isinstance(method, (str, dict)):
        raise InvalidConfig(f"method={method!r}: expected a weight method, or its name")
    return read_weight_method(method)
