"""What is recorded of a tensor while calibrating; observers are those that suggest a range."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from torch_quant.core.granularity import Granularity, PerTensor, block_extremes
from torch_quant.core.naming import did_you_mean
from torch_quant.core.qparams import QParams, choose_qparams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig, NotCalibrated, QuantError

__all__ = [
    "CHANNELS",
    "OBSERVERS",
    "RANGE",
    "STATISTICS",
    "Observer",
    "Statistic",
    "check_observable",
    "count_of",
    "entry",
    "observer_class",
    "register_statistic",
    "require_finite",
    "statistic_class",
]

STATISTICS: dict[str, type[Statistic]] = {}
"""Every statistic by its name; filled at import by :func:`register_statistic`."""
OBSERVERS: dict[str, type[Observer]] = {}
"""Those of them that are observers."""

RANGE = "range"
"""What a statistic is for: the scale of a tensor comes from it. It is an observer."""
CHANNELS = "channels"
"""The extremes of each channel, which is the last dimension."""

T = TypeVar("T", bound="type[Statistic]")


def register_statistic(cls: T) -> T:
    """Class decorator: make ``cls`` known by its ``name``, so that states with it can be loaded."""
    STATISTICS[cls.name] = cls
    if issubclass(cls, Observer):
        OBSERVERS[cls.name] = cls
    return cls


def statistic_class(name: str) -> type[Statistic]:
    """The statistic registered as ``name``; raises :class:`InvalidConfig` listing all there are."""
    if name not in STATISTICS:
        raise InvalidConfig(
            f"unknown statistic {name!r}; expected one of {', '.join(sorted(STATISTICS))}"
            f"{did_you_mean(name, STATISTICS)}"
        )
    return STATISTICS[name]


def observer_class(name: str) -> type[Observer]:
    """The observer registered as ``name``; raises :class:`InvalidConfig` listing all there are."""
    if name not in OBSERVERS:
        raise InvalidConfig(
            f"unknown observer {name!r}; expected one of {', '.join(sorted(OBSERVERS))}"
            f"{did_you_mean(name, OBSERVERS)}"
        )
    return OBSERVERS[name]


def entry(state: Mapping[str, Any], name: str, *kinds: type) -> Any:
    """An entry of a saved state; raises :class:`InvalidConfig` unless it is one of ``kinds``."""
    if name not in state:
        raise InvalidConfig(f"{name!r} is missing")
    value = state[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise InvalidConfig(f"{name!r} is of type {type(value).__name__}; expected {expected}")
    return value


def count_of(state: Mapping[str, Any], name: str = "batches") -> int:
    """A count in a saved state; raises :class:`InvalidConfig` unless it is 0 or more."""
    count: int = entry(state, name, int)
    if count < 0:
        raise InvalidConfig(f"{name!r} is {count}; expected 0 or more")
    return count


def check_observable(x: Tensor) -> None:
    """Raise :class:`QuantError` unless ``x`` is a float tensor with an element."""
    if not x.is_floating_point():
        raise QuantError(f"expected a float tensor, got {x.dtype}")
    if x.numel() == 0:
        raise QuantError(f"the tensor is empty: shape {tuple(x.shape)}")


def require_finite(x: Tensor, low: Tensor, high: Tensor) -> None:
    """Raise :class:`QuantError` if ``x``, with the extremes ``low`` and ``high``, is not finite."""
    if low.dim() == 0:
        finite = math.isfinite(low.item()) and math.isfinite(high.item())
    else:
        finite = torch.equal(low - low, high - high)  # 0 where finite, else NaN
    if not finite:
        what = "NaN" if bool(torch.isnan(x).any()) else "Inf"
        raise QuantError(f"the tensor holds {what}, shape {tuple(x.shape)}")


S = TypeVar("S", bound="Statistic")


class Statistic(ABC):
    """What is known of one tensor over all batches, in memory that does not grow with them.

    A subclass has a ``name``, and is known by it under ``@register_statistic``. It can be made
    without arguments, to be loaded.
    """

    name: ClassVar[str]
    in_place: ClassVar[bool] = True
    """Whether :meth:`observe` may write to what it holds. A class that only replaces it says False,
    for itself and not for classes below it: a batch that may be taken back costs less then."""
    disposable = False
    """Whether who reads it next may write to what it holds, as nobody will read it after."""

    def __init__(self) -> None:
        self.batches = 0

    def snapshot(self: S) -> S:
        """The same as it is now, whatever is observed later.

        >>> statistic = STATISTICS["minmax"]()
        >>> before = statistic.snapshot()
        >>> statistic.observe(torch.ones(2))
        >>> before.batches, statistic.batches
        (0, 1)
        """
        if vars(type(self)).get("in_place", True):
            return copy.deepcopy(self)
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Record one batch.

        Args:
            x: a non-empty float tensor of any shape and float dtype; it is not kept.

        Raises:
            QuantError: ``x`` is empty or not floating-point, or holds NaN or Inf; nothing is
                recorded then.
        """

    def merge(self, other: Statistic) -> None:
        """Take in what ``other`` has recorded of the same tensor; ``other`` stays as it is.

        Raises:
            InvalidConfig: it is another statistic, or has other options.
        """
        if type(other) is not type(self):
            raise InvalidConfig(f"{self.name} and {other.name} cannot be merged")
        if not other.batches:
            return
        if self.batches:
            self._merge(other)
            self.batches += other.batches
        else:
            self.load_state_dict(other.state_dict())

    @abstractmethod
    def _merge(self, other: Any) -> None:
        """Take in ``other``, of the same class; both have seen data."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything recorded, and the options that it depends on, as tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave, bit for bit.

        Raises:
            InvalidConfig: an entry is none that :meth:`state_dict` gives; says which.
        """


class Observer(Statistic):
    """A statistic that suggests a range.

    It does not depend on element type or scheme: :meth:`qparams` turns it into scales for any spec,
    as often as asked, and more data may be observed afterwards.

    Args:
        granularity: which elements have their statistics together.
    """

    def __init__(self, granularity: Granularity | None = None) -> None:
        super().__init__()
        self.granularity = granularity or PerTensor()

    def observe(self, x: Tensor) -> None:
        check_observable(x)
        if x.requires_grad:
            x = x.detach()
        low, high = block_extremes(x, self.granularity)
        require_finite(x, low, high)
        self._record(x, low, high)
        self.batches += 1

    @abstractmethod
    def _record(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Take in a batch whose exact finite extremes are ``low`` and ``high``."""

    @abstractmethod
    def _range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """The range worth representing in ``spec``'s format, same shapes as the extremes."""

    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """The (minimum, maximum) that ``spec`` should cover, in the shape of the blocks' grid.

        Raises:
            NotCalibrated: no data was observed.
            InvalidConfig: ``spec``'s granularity is not that of the statistics.
        """
        self._check(spec)
        return self._range(spec)

    def _check(self, spec: QuantSpec) -> None:
        """Raise what :meth:`range` documents, where ``spec`` cannot be served."""
        if self.batches == 0:
            raise NotCalibrated("no data was observed; run the calib proxy on data first")
        if not self.granularity.serves(spec.granularity):
            raise InvalidConfig(
                f"an observer of statistics {self.granularity} has no ranges for a {spec}"
            )

    def qparams(self, spec: QuantSpec) -> QParams:
        """Scales for ``spec``; raises as :meth:`range` does."""
        low, high = self.range(spec)
        if spec.clip != 1.0:
            low, high = low * spec.clip, high * spec.clip
        return choose_qparams(low, high, spec)

    def merge(self, other: Statistic) -> None:
        if isinstance(other, Observer) and other.batches and self.batches:
            mine, theirs = self.granularity, other.granularity
            if type(other) is type(self) and mine != theirs:
                raise InvalidConfig(
                    f"statistics {mine} and {theirs} of one tensor cannot be merged"
                )
        super().merge(other)
