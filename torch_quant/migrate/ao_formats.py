"""Formats of PyTorch's own observers, fake-quantizers and quantization specs.

Nothing of ``torch.ao`` or ``torchao`` is imported: objects are read by their attributes, which are
those of torch 2.8 to 2.13 and of torchao's PT2E quantizers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from torch_quant import recipes
from torch_quant.config import QConfig
from torch_quant.core.elements import IntegerType
from torch_quant.core.granularity import PerChannel
from torch_quant.core.spec import FLOAT, QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.migrate.result import Rows

__all__ = ["pair_of", "read_pair"]

_LIMITS = {
    torch.quint8: (0, 255), torch.uint8: (0, 255), torch.qint8: (-128, 127),
    torch.int8: (-128, 127), torch.quint4x2: (0, 15),
}  # fmt: skip
_OBSERVERS = {
    "MinMaxObserver": "minmax",
    "PerChannelMinMaxObserver": "minmax",
    "MovingAverageMinMaxObserver": "moving_average",
    "MovingAveragePerChannelMinMaxObserver": "moving_average",
    "HistogramObserver": "histogram",
}
_AVERAGING = 0.01
"""Of ``moving_average`` here, and of torch.ao."""


@dataclass(frozen=True)
class _Format:
    """One tensor's format as torch.ao has it.

    Args:
        limits: smallest and largest code, None for float.
        symmetric: whether the zero point is fixed.
        per_channel: whether channels have scales of their own.
        dynamic: whether scales are chosen at each call.
        observer: the name of the observer's class.
        averaging: the constant of a moving average, None for another observer.
        dtype: as it is called there.
    """

    limits: tuple[int, int] | None
    symmetric: bool = False
    per_channel: bool = False
    dynamic: bool = False
    observer: str = ""
    averaging: float | None = None
    dtype: str = "float32"

    @classmethod
    def of(cls, given: Any, what: str) -> _Format:
        """The format of what makes an observer, of a spec of PT2E, or None for float."""
        if given is None:
            return cls(None)
        maker = getattr(given, "observer_or_fake_quant_ctr", None) or given
        if isinstance(given, type) and issubclass(given, torch.nn.Identity):
            return cls(None)
        try:
            with warnings.catch_warnings():  # of deprecated options, which the user has met
                warnings.simplefilter("ignore")
                made = maker() if callable(maker) else None
        except Exception as error:  # whatever a factory of the user's raises
            raise InvalidConfig(
                f"{what}: {maker!r} makes no observer: {type(error).__name__}: {error}"
            ) from error
        observer = getattr(made, "activation_post_process", made)
        source = given if hasattr(given, "observer_or_fake_quant_ctr") else made
        dtype = getattr(source, "dtype", torch.float32)
        name = str(dtype).removeprefix("torch.")
        if dtype not in _LIMITS or isinstance(made, torch.nn.Identity):
            if dtype is torch.qint32 or dtype is torch.int32:
                raise InvalidConfig(f"{what}: codes are {name}; expected 8 bits, or float")
            return cls(None, dtype=name)
        low, high = _LIMITS[dtype]
        scheme = str(getattr(source, "qscheme", None) or getattr(observer, "qscheme", ""))
        ends = getattr(source, "quant_min", None), getattr(source, "quant_max", None)
        return cls(
            (low if ends[0] is None else ends[0], high if ends[1] is None else ends[1]),
            "symmetric" in scheme,
            "per_channel" in scheme,
            bool(getattr(source, "is_dynamic", False)),
            type(observer).__name__,
            getattr(observer, "averaging_constant", None),
            name,
        )

    def __str__(self) -> str:
        if self.limits is None:
            return self.dtype
        scheme = "per_channel" if self.per_channel else "per_tensor"
        scheme += "_symmetric" if self.symmetric else "_affine"
        dynamic = ", dynamic" if self.dynamic else ""
        return f"{self.dtype} {list(self.limits)} {scheme}, {self.observer}{dynamic}"


def read_pair(activation: Any, weight: Any, place: str, rows: Rows) -> QConfig | None:
    """The QConfig for an activation's and a weight's observer, None for float.

    Args:
        activation: what makes the observer of activations, or PT2E's spec.
        weight: the same of weights.
        place: what they are for, for messages and the report.
        rows: the report.

    Raises:
        InvalidConfig: codes have other than 8 bits; something makes no observer.
    """
    inputs, weights = (
        _Format.of(each, f"{place}{name}")
        for name, each in (("activation", activation), ("weight", weight))
    )
    if weights.limits is None:
        entry = f"{place}activation {inputs}, weight {weights}"
        if weights.dtype == inputs.dtype == "float32":
            rows.same(entry, "float")
        elif weights.dtype in ("float16", "bfloat16"):
            rows.differs(entry, "float32", "recipes.bfloat16() has products in bfloat16")
        else:
            rows.differs(entry, "float", "a layer in integers has a weight in integers")
        return None
    weight_spec = _weight(weights, place, rows)
    if inputs.limits is None:
        if inputs.dtype == "float32":
            rows.same(f"{place}activation {inputs}", "float")
        else:
            why = "activations have 8 bits or are in float32 here"
            rows.differs(f"{place}activation {inputs}", "float32", why)
        return QConfig(FLOAT, weight_spec or QuantSpec.of("int8", per_channel=True))
    if inputs.dynamic:
        found = recipes.int8_dynamic(symmetric=inputs.symmetric)
        why = "a scale for each token is finer than one for the tensor"
        rows.differs(f"{place}activation {inputs}", str(found.input), why)
        return QConfig(found.input, weight_spec or found.weight)
    return _static(inputs, weight_spec, place, rows)


def _weight(found: _Format, place: str, rows: Rows) -> QuantSpec | None:
    """The format of a weight; None where it is that of all backends."""
    entry, limits = f"{place}weight {found}", found.limits or (-128, 127)
    signed = limits[0] < 0
    element = IntegerType(*limits) if signed else IntegerType.of(8, signed=True)
    spec = QuantSpec(element, True, PerChannel())
    if not found.per_channel:
        rows.differs(entry, str(spec), "a scale per output channel is finer, and costs nothing")
    elif not found.symmetric or not signed:
        rows.differs(entry, str(spec), "kernels take signed, symmetric weights")
    else:
        rows.same(entry, str(spec))
    return None if spec == QuantSpec.of("int8", per_channel=True) else spec


def _static(found: _Format, weight: QuantSpec | None, place: str, rows: Rows) -> QConfig:
    entry = f"{place}activation {found}"
    spec = QuantSpec(IntegerType(*(found.limits or (0, 255))), found.symmetric)
    name = _OBSERVERS.get(found.observer)
    here = f"{spec}, observer {name or 'minmax'}"
    if name is None:
        rows.differs(entry, here, f"there is no {found.observer} here")
    elif found.per_channel:
        rows.differs(entry, here, "no kernel multiplies activations with a scale per channel")
    elif name == "histogram":
        rows.differs(entry, here, "least squared error too, by another search")
    elif found.averaging not in (None, _AVERAGING):
        rows.differs(entry, here, f"the average moves by {_AVERAGING}, not by {found.averaging}")
    else:
        rows.same(entry, here)
    return QConfig(
        None if spec == QuantSpec.of(bits=8) else spec,
        weight,
        observer=None if name == "minmax" else name,
    )


def pair_of(given: Any, what: str) -> tuple[Any, Any]:
    """The two parts of a qconfig, or of PT2E's ``QuantizationConfig``.

    Raises:
        InvalidConfig: it is neither.

    >>> from types import SimpleNamespace
    >>> pair_of(SimpleNamespace(activation=1, weight=2), "head")
    (1, 2)
    """
    for names in (("activation", "weight"), ("input_activation", "weight")):
        if all(hasattr(given, name) for name in names):
            return getattr(given, names[0]), getattr(given, names[1])
    kind = dict(given) if isinstance(given, Mapping) else given
    raise InvalidConfig(
        f"{what} is {kind!r}; expected a qconfig of torch.ao (activation, weight), or None"
    )
