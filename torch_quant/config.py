"""What a user may ask for: formats, observers, and which sites are quantized at all."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from torch_quant.core.granularity import Granularity, PerTensor, PerToken
from torch_quant.core.naming import did_you_mean
from torch_quant.core.plan import is_share
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.observers import Observer, observer_class

__all__ = [
    "ModuleFilter",
    "ObserverLike",
    "OverrideKey",
    "Overrides",
    "QConfig",
    "SiteInfo",
    "check_names",
    "matched_depth",
    "matches_name",
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


def matches_name(name: str, pattern: str) -> bool:
    """Whether ``pattern`` covers ``name``: the site, a later call of it, or a module above it.

    >>> matches_name("encoder.layer.0.query", "encoder.layer.*")
    True
    >>> matches_name("encoder.layer.0.query", r"re:encoder.layer.[12]")
    False
    """
    return matched_depth(name, pattern) > 0


def matched_depth(name: str, pattern: str) -> int:
    """How deep the outermost module lies that ``pattern`` covers, 0 if it does not cover ``name``.

    Args:
        name: a site.
        pattern: a name, a glob, or ``re:`` and a regular expression for a whole name.

    >>> matched_depth("encoder.layer.0.query", "encoder.*")
    2
    >>> matched_depth("encoder.layer.0.query", "*.query")
    4
    """
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        prefix = ".".join(parts[:end])
        if _matches(prefix, pattern):
            return end
        if "@" in prefix and _matches(_without_calls(prefix), pattern):
            return end
    return 0


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise InvalidConfig(
                f"{pattern!r} is no regular expression of Python: {error}"
            ) from error
    return fnmatch.fnmatchcase(name, pattern)


def _without_calls(name: str) -> str:
    return ".".join(part.partition("@")[0] for part in name.split("."))


def check_names(
    patterns: Iterable[str], known: Iterable[str], what: str, others: Iterable[str] = ()
) -> None:
    """Raise :class:`InvalidConfig` with the closest matches for a pattern that covers nothing.

    Args:
        patterns: names, globs and regular expressions.
        known: what they may cover.
        what: what they are, for the message.
        others: what else may have been meant.
    """
    known = list(dict.fromkeys(known))
    for pattern in patterns:
        if any(matches_name(name, pattern) for name in known):
            continue
        hint = did_you_mean(pattern.removeprefix("re:"), [*others, *known])
        raise InvalidConfig(f"{what} {pattern!r} matches nothing in the model{hint}")
