"""What a user may ask for: formats, observers, and which sites are quantized at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_quant.core.documents import Lines, Place, check_keys, check_kind, shown
from torch_quant.core.granularity import Granularity, PerTensor, PerToken
from torch_quant.core.naming import (
    class_named,
    class_path,
    did_you_mean,
    matches_name,
)
from torch_quant.core.plan import is_share
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.statistics import OBSERVERS, Observer, observer_class

__all__ = [
    "ModuleFilter",
    "ObserverLike",
    "OverrideKey",
    "Overrides",
    "QConfig",
    "SiteInfo",
    "read_filter",
    "read_qconfig",
]

ObserverLike = str | Callable[[Granularity], Observer]
"""An observer's registered name, its class, or anything that makes one from a granularity."""


@dataclass(frozen=True)
class QConfig:
    """Formats and observers of one site; what is None is the backend's or the op's default.

    Args:
        input: format of the activations, per tensor.
        weight: format of the weight.
        observer: statistics taken of activations.
        weight_observer: statistics taken of weights.
        smooth: 0 to 1, how much of the spread between the channels of a linear layer's input goes
            over to its weight before both are quantized: SmoothQuant's alpha. 0.7 to 0.8 help
            transformers, whose activations have a few channels far larger than the rest; None, the
            default, leaves it out. Ask for it before calibrating; the input's range is then that
            of its channels, whatever ``observer`` is.

    Raises:
        InvalidConfig: per-channel activations, weights per token, an unknown observer name,
            ``smooth`` not 0 to 1.
    """

    input: QuantSpec | None = None
    weight: QuantSpec | None = None
    observer: ObserverLike | None = None
    weight_observer: ObserverLike = "minmax"
    smooth: float | None = None

    def __post_init__(self) -> None:
        if self.smooth is not None and not is_share(self.smooth):
            raise InvalidConfig(f"QConfig(smooth=...) is {self.smooth!r}; expected 0 to 1, or None")
        for name in ("input", "weight"):
            spec = getattr(self, name)
            if spec is not None and not isinstance(spec, QuantSpec):
                raise InvalidConfig(f"QConfig({name}=...) is {spec!r}; expected a QuantSpec")
        if self.input is not None and not isinstance(self.input.granularity, PerTensor | PerToken):
            raise InvalidConfig(
                f"QConfig(input=...) is {self.input.granularity}, but no kernel multiplies such "
                "activations; use QuantSpec.of(..., granularity=PerTensor()), or PerToken()"
            )
        if self.weight is not None and isinstance(self.weight.granularity, PerToken):
            raise InvalidConfig(
                "QConfig(weight=...) is per token, which activations can be; use PerChannel()"
            )
        for observer in (self.observer, self.weight_observer):
            if isinstance(observer, str):
                observer_class(observer)
            elif observer is not None and not callable(observer):
                raise InvalidConfig(f"QConfig observer is {observer!r}; expected a name or a class")

    def to_dict(self) -> dict[str, Any]:
        """What is not the default, ready for JSON and YAML; :meth:`from_dict` reads it back.

        Raises:
            InvalidConfig: an observer is no registered one, so that it has no name.

        >>> QConfig(observer="histogram", smooth=0.8).to_dict()
        {'observer': 'histogram', 'smooth': 0.8}
        """
        data: dict[str, Any] = {}
        for name in ("input", "weight"):
            if (spec := getattr(self, name)) is not None:
                data[name] = spec.to_dict()
        if self.observer is not None:
            data["observer"] = _registered_name(self.observer)
        if (observer := _registered_name(self.weight_observer)) != "minmax":
            data["weight_observer"] = observer
        return data if self.smooth is None else {**data, "smooth": self.smooth}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QConfig:
        """Read what :meth:`to_dict` gives, or a shorter form of the formats.

        Raises:
            InvalidConfig: an entry is unknown or wrong; says which, and what was expected.

        >>> QConfig.from_dict({"input": {"bits": 6}}).input == QuantSpec.of(bits=6)
        True
        """
        return read_qconfig(data, (), "the configuration", Lines("QConfig.from_dict"))


def _registered_name(observer: ObserverLike) -> str:
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
}  # fmt: skip
"""Arguments of :meth:`QuantSpec.of` as data."""
_EXPECTED = {str: "a name", int: "an integer", bool: "true or false, without quotes"}
_LIMITS = ("quant_min", "quant_max")


def read_qconfig(data: Any, place: Place, what: str, lines: Lines) -> QConfig:
    """The QConfig that stands at ``place`` of a file; raises :class:`InvalidConfig` with its line.

    Args:
        data: the entry.
        place: where it stands.
        what: what it is, for messages.
        lines: the lines of the file.
    """
    check_kind(data, dict, place, what, lines)
    fields = ("input", "weight", "observer", "weight_observer", "smooth")
    check_keys(data, place, fields, what, lines, optional=fields)
    values = dict(data)
    for name in ("observer", "weight_observer"):
        given = data.get(name, "minmax")
        if given is None and name == "observer":
            continue
        if not isinstance(given, str) or given not in OBSERVERS:
            hint = did_you_mean(given, OBSERVERS) if isinstance(given, str) else ""
            expected = f"one of {', '.join(sorted(OBSERVERS))}{hint}"
            message = f"{what}: {name!r} is {shown(given)}; expected {expected}"
            raise lines.error((*place, name), message)
    smooth = data.get("smooth")
    if smooth is not None and (isinstance(smooth, bool) or not is_share(smooth)):
        message = f"{what}: 'smooth' is {shown(smooth)}; expected a number from 0 to 1, or null"
        raise lines.error((*place, "smooth"), message)
    for name in ("input", "weight"):
        if data.get(name) is not None:
            values[name] = _read_spec(data[name], (*place, name), f"{what}: {name!r}", lines)
            try:
                QConfig(**{name: values[name]})
            except InvalidConfig as error:
                raise lines.error((*place, name), f"{what}: {error}") from error
    return QConfig(**values)


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
"""A site's or module's name, a glob, ``re:`` and a regular expression, an op type (``op:linear`` or
``linear``), a module class (or ``class:`` and its path), or a function of a :class:`SiteInfo`."""
Overrides = Mapping[OverrideKey, QConfig | None]
"""What it covers -> its QConfig, None for float. The more specific wins, see ``graph/rules.py``."""


def _names(value: Iterable[str] | str) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


@dataclass(frozen=True)
class ModuleFilter:
    """Which sites are quantized. Exclude beats include; names beat classes and op types.

    A name is that of a site or of a module above it, or a glob (``"encoder.layer.0.*"``). With any
    include given, only what it covers is quantized. In order: an excluded name, an included name,
    an excluded class or op type, an included class or op type decides.

    Raises:
        InvalidConfig: when it is applied, for a name that matches nothing.
    """

    include_names: tuple[str, ...] = ()
    exclude_names: tuple[str, ...] = ()
    include_classes: tuple[type[nn.Module], ...] = ()
    exclude_classes: tuple[type[nn.Module], ...] = ()
    include_op_types: tuple[str, ...] = ()
    exclude_op_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include_names", "exclude_names", "include_op_types", "exclude_op_types"):
            object.__setattr__(self, name, _names(getattr(self, name)))
        for name in ("include_classes", "exclude_classes"):
            value = getattr(self, name)
            classes = (value,) if isinstance(value, type) else tuple(value)
            if not all(isinstance(c, type) and issubclass(c, nn.Module) for c in classes):
                raise InvalidConfig(f"ModuleFilter({name}=...) holds {value!r}; expected classes")
            object.__setattr__(self, name, classes)

    def to_dict(self) -> dict[str, Any]:
        """What is not empty, ready for JSON and YAML; :meth:`from_dict` reads it back.

        Raises:
            InvalidConfig: a class cannot be found by its path.

        >>> ModuleFilter(exclude_names="head", exclude_classes=nn.LSTM).to_dict()
        {'exclude_names': ['head'], 'exclude_classes': ['torch.nn.LSTM']}
        """
        data = {name: list(getattr(self, name)) for name in _FILTERS}
        for name in ("include_classes", "exclude_classes"):
            data[name] = [class_path(cls) for cls in getattr(self, name)]
        return {name: values for name, values in data.items() if values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModuleFilter:
        """Read what :meth:`to_dict` gives; one name may stand without a list around it.

        Raises:
            InvalidConfig: an entry is unknown or wrong, or a class is not imported.

        >>> ModuleFilter.from_dict({"exclude_classes": "torch.nn.LSTM"}).exclude_classes
        (<class 'torch.nn.modules.rnn.LSTM'>,)
        """
        return read_filter(data, (), "the filter", Lines("ModuleFilter.from_dict"))

    def refusal(self, name: str, op: str, modules: tuple[nn.Module, ...]) -> str | None:
        """Why the site stays in float, or None.

        Args:
            name: the site.
            op: its op type.
            modules: the modules it runs in, outermost first.

        >>> ModuleFilter(exclude_names="encoder.*").refusal("encoder.query", "linear", ())
        'excluded by name'
        """
        return self.verdict(name, op, modules)[0]

    def verdict(self, name: str, op: str, modules: tuple[nn.Module, ...]) -> tuple[str | None, str]:
        """Why the site stays in float, or None, and the entry that decides, empty if none does.

        Args:
            name: the site.
            op: its op type.
            modules: the modules it runs in, outermost first.

        >>> ModuleFilter(exclude_names="encoder.*").verdict("encoder.query", "linear", ())
        ('excluded by name', "exclude_names='encoder.*'")
        """

        def named(patterns: tuple[str, ...]) -> str | None:
            return next((repr(each) for each in patterns if matches_name(name, each)), None)

        def classed(classes: tuple[type[nn.Module], ...]) -> str | None:
            found = (c.__qualname__ for c in classes if any(isinstance(m, c) for m in modules))
            return next(found, None)

        if entry := named(self.exclude_names):
            return "excluded by name", f"exclude_names={entry}"
        if entry := named(self.include_names):
            return None, f"include_names={entry}"
        if entry := classed(self.exclude_classes):
            return "excluded by class", f"exclude_classes={entry}"
        if op in self.exclude_op_types:
            return "excluded by op type", f"exclude_op_types={op!r}"
        if entry := classed(self.include_classes):
            return None, f"include_classes={entry}"
        if op in self.include_op_types:
            return None, f"include_op_types={op!r}"
        if self.include_names or self.include_classes or self.include_op_types:
            return "not included", "no include_ entry covers it"
        return None, ""

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.include_names, *self.exclude_names)

    @property
    def op_types(self) -> tuple[str, ...]:
        return (*self.include_op_types, *self.exclude_op_types)


_FILTERS = (
    "include_names", "exclude_names", "include_classes", "exclude_classes", "include_op_types",
    "exclude_op_types",
)  # fmt: skip


def read_filter(data: Any, place: Place, what: str, lines: Lines) -> ModuleFilter:
    """The filter that stands at ``place`` of a file, as :func:`read_qconfig` reads a QConfig."""
    check_kind(data, dict, place, what, lines)
    check_keys(data, place, _FILTERS, what, lines, optional=_FILTERS)
    values: dict[str, Any] = {}
    for name, given in data.items():
        entries = [given] if isinstance(given, str) else given
        if not isinstance(entries, list) or not all(isinstance(e, str) and e for e in entries):
            message = f"{what}: {name!r} is {shown(given)}; expected a list of names"
            raise lines.error((*place, name), message)
        values[name] = list(entries)
        for i, entry in enumerate(entries):
            try:
                if name.endswith("_classes"):
                    values[name][i] = class_named(entry.removeprefix("class:"))
                elif name.endswith("_names"):
                    matches_name("x", entry)  # compiles a regular expression
            except InvalidConfig as error:
                at = (*place, name) if isinstance(given, str) else (*place, name, i)
                raise lines.error(at, f"{what}: {name!r}: {error}") from error
    return ModuleFilter(**values)
