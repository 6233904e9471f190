"""What a user may ask for: formats, observers, and which sites are quantized at all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from torch_quant.core.documents import Lines, Place, check_keys, check_kind, shown
from torch_quant.core.granularity import Granularity, PerGroup, PerTensor, PerToken
from torch_quant.core.methods import (
    Method,
    Transform,
    WeightMethod,
    read_transform,
    read_weight_method,
)
from torch_quant.core.naming import (
    did_you_mean,
)
from torch_quant.core.spec import BFLOAT16, FLOAT, FloatFormat, QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.statistics import OBSERVERS, Observer, observer_class

__all__ = [
    "ObserverLike",
    "OverrideKey",
    "Overrides",
    "QConfig",
    "RECIPES",
    "SiteInfo",
    "check_observer",
    "made_observer",
    "read_qconfig",
    "read_transforms",
    "register_recipe",
    "registered_name",
]

M = TypeVar("M", bound=Method)

ObserverLike = str | Callable[[Granularity], Observer]
"""An observer's registered name, its class, or anything that makes one from a granularity."""


@dataclass(frozen=True)
class QConfig:
    """Formats and observers of one site; what is None is the backend's or the op's default.

    Args:
        input: format of the activations, per tensor; or, with ``dynamic=True``, per tensor, token
            or group. ``FLOAT`` leaves them in float.
        weight: format of the weight; ``FLOAT`` leaves it in float. ``BFLOAT16`` for both multiplies
            in bfloat16.
        observer: statistics taken of activations.
        transforms: what makes it easier to quantize, such as :class:`SmoothQuant`, in order. Each
            holds for the sites that it can serve.
        method: how the weight is rounded; None for :class:`RoundToNearest`.

    Raises:
        InvalidConfig: per-channel activations, weights per token, both in float, one of them alone
            in bfloat16 or anything beside it, an unknown observer name, something else than
            transforms or a weight method.
    """

    input: QuantSpec | FloatFormat | None = None
    weight: QuantSpec | FloatFormat | None = None
    observer: ObserverLike | None = None
    transforms: Sequence[Transform] = ()
    method: WeightMethod | None = None

    def __post_init__(self) -> None:
        listed = isinstance(self.transforms, (list, tuple))
        if not listed or not all(isinstance(each, Transform) for each in self.transforms):
            raise InvalidConfig(
                f"QConfig(transforms=...) is {self.transforms!r}; expected a list of transforms, "
                "such as [SmoothQuant(0.8)]"
            )
        object.__setattr__(self, "transforms", tuple(self.transforms))
        if self.method is not None and not isinstance(self.method, WeightMethod):
            raise InvalidConfig(
                f"QConfig(method=...) is {self.method!r}; expected such as RoundToNearest()"
            )
        for name in ("input", "weight"):
            spec = getattr(self, name)
            if spec is not None and not isinstance(spec, QuantSpec | FloatFormat):
                raise InvalidConfig(
                    f"QConfig({name}=...) is {spec!r}; expected a QuantSpec, or FLOAT"
                )
        if BFLOAT16 in (self.input, self.weight) and self.input is not self.weight:
            raise InvalidConfig(
                f"QConfig(input={self.input!r}, weight={self.weight!r}): products in bfloat16 have "
                "both operands in it, QConfig(BFLOAT16, BFLOAT16)"
            )
        given = (
            ("observer", self.observer),
            ("transforms", self.transforms),
            ("method", self.method),
        )
        idle = [name for name, value in given if value]
        if self.input is BFLOAT16 and idle:
            raise InvalidConfig(
                f"QConfig(BFLOAT16, BFLOAT16, {'=..., '.join(idle)}=...): bfloat16 is rounded to "
                f"without scales or data, so {', '.join(idle)} would have no effect; leave "
                f"{'it' if len(idle) == 1 else 'them'} out"
            )
        if self.input is FLOAT and self.weight is FLOAT:
            raise InvalidConfig(
                "QConfig(input=FLOAT, weight=FLOAT) quantizes nothing; overrides={name: None} "
                "leaves a site in float"
            )
        if isinstance(self.input, QuantSpec) and not isinstance(
            self.input.granularity, PerTensor | PerToken | PerGroup
        ):
            raise InvalidConfig(
                f"QConfig(input=...) is {self.input.granularity}, but no kernel multiplies such "
                "activations; use QuantSpec.of(..., granularity=PerTensor()), or PerToken()"
            )
        if isinstance(self.weight, QuantSpec) and isinstance(self.weight.granularity, PerToken):
            raise InvalidConfig(
                "QConfig(weight=...) is per token, which activations can be; use PerChannel()"
            )
        if isinstance(self.input, QuantSpec) and self.input.float_zero_points:
            raise InvalidConfig(
                "QConfig(input=...) has float zero points, which weights alone can have; use "
                "QuantSpec.of(..., float_zero_points=False)"
            )
        if isinstance(self.weight, QuantSpec) and self.weight.clip != 1.0:
            raise InvalidConfig(
                f"QConfig(weight=...) has clip={self.weight.clip}, which is of a range that "
                "calibration recorded; weights are clipped by their method, such as GPTQ()"
            )
        if self.observer is not None:
            check_observer(self.observer)

    @property
    def needs_ranges(self) -> bool:
        """Whether calibration gives the scales of activations, as for static formats.

        >>> QConfig().needs_ranges, QConfig(FLOAT).needs_ranges
        (True, False)
        """
        return not (isinstance(self.input, FloatFormat) or (self.input and self.input.dynamic))

    def to_dict(self) -> dict[str, Any]:
        """What is not the default, ready for JSON and YAML; :meth:`from_dict` reads it back.

        Raises:
            InvalidConfig: an observer is no registered one, so that it has no name.

        >>> from torch_quant import SmoothQuant
        >>> QConfig(observer="histogram", transforms=[SmoothQuant(0.8)]).to_dict()["transforms"]
        [{'name': 'smoothquant', 'alpha': 0.8, 'min_gain': 0.0}]
        """
        data: dict[str, Any] = {}
        for name in ("input", "weight"):
            if (spec := getattr(self, name)) is not None:
                data[name] = str(spec) if isinstance(spec, FloatFormat) else spec.to_dict()
        if self.observer is not None:
            data["observer"] = registered_name(self.observer)
        if self.transforms:
            data["transforms"] = [each.to_dict() for each in self.transforms]
        return data if self.method is None else {**data, "method": self.method.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QConfig:
        """Read what :meth:`to_dict` gives, or a shorter form of the formats.

        Raises:
            InvalidConfig: an entry is unknown or wrong; says which, and what was expected.

        >>> QConfig.from_dict({"input": {"bits": 6}}).input == QuantSpec.of(bits=6)
        True
        """
        return read_qconfig(data, (), "the configuration", Lines("QConfig.from_dict"))


RECIPES: dict[str, Callable[..., QConfig]] = {}
"""Every recipe by its name; filled at import by :func:`register_recipe`."""

R = TypeVar("R", bound=Callable[..., QConfig])


def register_recipe(function: R) -> R:
    """Decorator: make a function that gives a :class:`QConfig` known by its name, to files too.

    >>> @register_recipe
    ... def five_bits(*, symmetric: bool = False) -> QConfig:
    ...     return QConfig(QuantSpec.of(bits=5, symmetric=symmetric))
    >>> QConfig.from_dict({"recipe": "five_bits", "symmetric": True}) == five_bits(symmetric=True)
    True
    >>> del RECIPES["five_bits"]
    """
    RECIPES[function.__name__] = function
    return function


def check_observer(observer: ObserverLike) -> None:
    """Raise :class:`InvalidConfig` unless ``observer`` is a known name or can make one."""
    if isinstance(observer, str):
        observer_class(observer)
    elif not callable(observer):
        raise InvalidConfig(f"the observer is {observer!r}; expected a name or a class")


def made_observer(choice: ObserverLike, granularity: Granularity) -> Observer:
    """A new observer of the kind that was asked for."""
    factory = observer_class(choice) if isinstance(choice, str) else choice
    return factory(granularity)


def registered_name(observer: ObserverLike) -> str:
    """The name under which an observer can be found; raises :class:`InvalidConfig` without one."""
    name = observer if isinstance(observer, str) else getattr(observer, "name", None)
    if isinstance(observer, str) or (name and OBSERVERS.get(name) is observer):
        return str(name)
    raise InvalidConfig(
        f"the observer {observer!r} is an object of Python and cannot be written as data: give it "
        "a name with torch_quant.statistics.register_statistic"
    )


_SHORT = {
    "element": str, "bits": int, "signed": bool, "symmetric": bool, "per_channel": bool,
    "granularity": str, "scale_type": str, "dynamic": bool,
    "float_zero_points": bool, "clip": float,
}  # fmt: skip
"""Arguments of :meth:`QuantSpec.of` as data."""
_EXPECTED = {
    str: "a name", int: "an integer", bool: "true or false, without quotes",
    float: "a number with a point",
}  # fmt: skip
_LIMITS = ("quant_min", "quant_max")


def read_qconfig(data: Any, place: Place, what: str, lines: Lines) -> QConfig:
    """The QConfig that stands at ``place`` of a file; raises :class:`InvalidConfig` with its line.

    Args:
        data: the entry.
        place: where it stands.
        what: what it is, for messages.
        lines: the lines of the file.
    """
    if isinstance(data, str):
        data = {"recipe": data}
    check_kind(data, dict, place, what, lines)
    if "recipe" in data:
        return _read_recipe(data, place, what, lines)
    fields = ("input", "weight", "observer", "transforms", "method")
    check_keys(data, place, fields, what, lines, optional=fields)
    values = dict(data)
    given = data.get("observer")
    if given is not None and (not isinstance(given, str) or given not in OBSERVERS):
        hint = did_you_mean(given, OBSERVERS) if isinstance(given, str) else ""
        expected = f"one of {', '.join(sorted(OBSERVERS))}{hint}"
        message = f"{what}: 'observer' is {shown(given)}; expected {expected}"
        raise lines.error((*place, "observer"), message)
    values["transforms"] = read_transforms(
        data.get("transforms"), (*place, "transforms"), what, lines
    )
    if (method := data.get("method")) is not None:
        values["method"] = _read(read_weight_method, method, (*place, "method"), what, lines)
    for name in ("input", "weight"):
        if data.get(name) is not None:
            if data[name] in map(str, FloatFormat):
                values[name] = FloatFormat(data[name])
                continue
            values[name] = _read_spec(data[name], (*place, name), f"{what}: {name!r}", lines)
            try:
                QConfig(**{name: values[name]})
            except InvalidConfig as error:
                raise lines.error((*place, name), f"{what}: {error}") from error
    try:
        return QConfig(**values)
    except InvalidConfig as error:
        raise lines.error(place, f"{what}: {error}") from error


def _read_recipe(data: Mapping[str, Any], place: Place, what: str, lines: Lines) -> QConfig:
    """What the recipe of a name makes of the options beside it."""
    name = data["recipe"]
    if not isinstance(name, str) or name not in RECIPES:
        hint = did_you_mean(name, RECIPES) if isinstance(name, str) else ""
        message = f"{what}: the recipe is {shown(name)}; expected one of {', '.join(RECIPES)}{hint}"
        raise lines.error((*place, "recipe"), message)
    options = {key: value for key, value in data.items() if key != "recipe"}
    known = list(inspect.signature(RECIPES[name]).parameters)
    for key in options:
        if key not in known:
            hint = did_you_mean(key, known)
            expected = ", ".join(known) or "no option"
            message = f"{what}: the recipe {name} has {key!r}; expected {expected}{hint}"
            raise lines.error((*place, key), message)
    try:
        return RECIPES[name](**options)
    except InvalidConfig as error:
        raise lines.error(place, f"{what}: {error}") from error
    except TypeError as error:  # an option of another type
        raise lines.error(place, f"{what}: the recipe {name}: {error}") from error


def read_transforms(data: Any, place: Place, what: str, lines: Lines) -> tuple[Transform, ...]:
    """The transforms that stand at ``place`` of a file: one or a list, by name or with options."""
    entries = [] if data is None else data if isinstance(data, list) else [data]
    several = isinstance(data, list)
    return tuple(
        _read(read_transform, each, (*place, i) if several else place, what, lines)
        for i, each in enumerate(entries)
    )


def _read(read: Callable[[Any], M], data: Any, place: Place, what: str, lines: Lines) -> M:
    try:
        return read(data)
    except InvalidConfig as error:
        raise lines.error(place, f"{what}: {error}") from error


def _read_spec(data: Any, place: Place, what: str, lines: Lines) -> QuantSpec:
    """A format: arguments of :meth:`QuantSpec.of`, or what ``to_dict`` of one gives."""
    check_kind(data, dict, place, what, lines)
    known = (*_SHORT, *_LIMITS)
    check_keys(data, place, known, what, lines, optional=known)
    for key, value in data.items():
        kind = _SHORT.get(key, int)
        if type(value) is not kind:
            message = f"{what}: {key!r} is {shown(value)}; expected {_EXPECTED[kind]}"
            raise lines.error((*place, key), message)
    try:
        return _spec_of(data)
    except InvalidConfig as error:
        raise lines.error(place, f"{what}: {error}") from error


def _spec_of(data: Mapping[str, Any]) -> QuantSpec:
    if "element" in data and {"bits", "signed"} & set(data):
        raise InvalidConfig("'element' says how many bits and which sign: leave those out")
    if set(_LIMITS) & set(data):  # as to_dict has it, complete
        if {"bits", "signed", "per_channel"} & set(data):
            raise InvalidConfig("'quant_min' and 'quant_max' go with 'element' and 'granularity'")
        return QuantSpec.from_dict(data)
    arguments = dict(data)
    if "granularity" in data:
        arguments["granularity"] = Granularity.parse(data["granularity"])
    return QuantSpec.of(**arguments)


@dataclass(frozen=True)
class SiteInfo:
    """What a function among the overrides is asked about; it returns whether it covers the site.

    Args:
        name: the site.
        op: its op type.
        module: the innermost module that it runs in.

    >>> site = SiteInfo("head", "linear", nn.Linear(16, 4))
    >>> isinstance(site.module, nn.Linear) and site.module.in_features < 32
    True
    """

    name: str
    op: str
    module: nn.Module


OverrideKey = str | type[nn.Module] | Callable[[SiteInfo], bool]
"""A site's or module's name, a glob, ``re:`` and a regular expression (``re?:`` if it may match
nothing), an op type (``op:linear`` or ``linear``), a module class (or ``class:`` and its path), or
a function of a :class:`SiteInfo`."""
Overrides = Mapping[OverrideKey, QConfig | None]
"""What it covers -> its QConfig, None for float. The more specific wins, see ``graph/rules.py``."""
