"""Second moments of the vectors that a linear layer reads: which errors of its weight matter.

The output error of a row ``e`` of weight errors is ``mean((e . x)^2) = e H e^T`` with the moments
``H = mean(x x^T)``, half the Hessian of the squared error (Hassibi and Stork 1993, "Second Order
Derivatives for Network Pruning: Optimal Brain Surgeon"). Its diagonal alone is the mean square of
each channel.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from torch_quant.errors import InvalidConfig, QuantError
from torch_quant.statistics._symmetric import SymmetricSums, lower_sums
from torch_quant.statistics.base import (
    Statistic,
    check_observable,
    count_of,
    entry,
    register_statistic,
)

__all__ = [
    "HESSIAN",
    "MEAN_SQUARE",
    "ChannelMean",
    "Hessian",
    "MeanSquare",
    "Moments",
    "channel_mean",
    "check_sums",
    "require_finite_squares",
]


def channel_mean(axis: int) -> str:
    """What a statistic is for: the mean of each channel along ``axis``, which corrections want.

    >>> channel_mean(-1)
    'channel_mean[-1]'
    """
    return f"channel_mean[{axis}]"


HESSIAN = "hessian"
"""What a statistic is for: the second moments of the input's channels, which GPTQ wants."""
MEAN_SQUARE = "mean_square"
"""The mean square of each of the input's channels."""


def require_finite_squares(x: Tensor, *, saturates: bool = False) -> None:
    """Raise :class:`QuantError` for a tensor whose squares have no finite sum; says why.

    Args:
        x: what was observed.
        saturates: whether squares that are too large for float32 will do.
    """
    if not bool(torch.isfinite(x).all()):
        what = "NaN" if bool(torch.isnan(x).any()) else "Inf"
        raise QuantError(f"the tensor holds {what}, shape {tuple(x.shape)}")
    if not saturates:
        raise QuantError(
            "the tensor holds numbers whose squares are too large for float32, shape "
            f"{tuple(x.shape)}"
        )


def check_sums(sums: Tensor, rows: int, batches: int) -> None:
    """Raise :class:`InvalidConfig` unless sums of a state are finite and fit their counts."""
    if not bool(torch.isfinite(sums).all()):
        raise InvalidConfig("'sums' is not finite")
    if (batches > 0) != (rows > 0) or (rows > 0) != (sums.numel() > 0):
        raise InvalidConfig(f"'rows' is {rows} and 'batches' {batches}")


_S = TypeVar("_S", bound="Moments")
_C = TypeVar("_C", bound="ChannelMean")


class Moments(Statistic):
    """Sums over all vectors along the last dimension, and how many vectors there were.

    Sums are replaced and never written to, so that copies may share them: a state is copied before
    each batch.
    """

    dimensions: int
    saturates = False
    """Whether sums too large for float32 become the largest there is; else they are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.sums = torch.zeros([0] * self.dimensions)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        check_observable(x)
        rows = self._rows(x.detach())
        if self.batches and rows.shape[1] != (channels := self._stored.shape[-1]):
            raise QuantError(f"vectors of {rows.shape[1]} channels after such of {channels}")
        sums = self._summed(self._stored.to(rows.device) if self.batches else None, rows)
        if not self._finite(sums):
            require_finite_squares(x, saturates=self.saturates)
            sums = torch.nan_to_num(sums)
        self._store(sums)
        self.rows, self.batches = self.rows + len(rows), self.batches + 1

    def _rows(self, x: Tensor) -> Tensor:
        """The vectors of a tensor, ``[n, channels]``."""
        return x.reshape(-1, x.shape[-1] if x.dim() else 1).to(torch.float32)

    @property
    def _stored(self) -> Tensor:
        """The sums as :meth:`_summed` gave them."""
        return self.sums

    def _store(self, sums: Tensor) -> None:
        """Take what :meth:`_summed` gave."""
        self.sums = sums

    @abstractmethod
    def _summed(self, sums: Tensor | None, rows: Tensor) -> Tensor:
        """A new tensor: ``sums``, if there are any, and those of ``rows``, ``[n, channels]``."""

    def _finite(self, sums: Tensor) -> bool:
        return bool(torch.isfinite(sums).all())

    @property
    def mean(self) -> Tensor:
        """The sums over the number of vectors, float32; empty where there was none."""
        return self.sums / max(self.rows, 1)

    def _empty(self: _S) -> _S:
        """One of the same kind that has seen nothing."""
        return type(self)()

    def __deepcopy__(self: _S, memo: Any) -> _S:
        copied = self._empty()
        copied.batches, copied.rows, copied.sums = self.batches, self.rows, self.sums
        return copied

    def scaled(self: _S, factor: Tensor) -> _S:
        """That of the channels times ``factor``, shape ``[channels]``."""
        made = self.__deepcopy__({})
        made.sums = self._times(factor)
        return made

    def at(self: _S, index: Tensor) -> _S:
        """That of the channels ``index``, int64 of shape ``[n]``; one may stand several times."""
        made = self.__deepcopy__({})
        made.sums = self.sums[index]
        return made

    @abstractmethod
    def _times(self, factor: Tensor) -> Tensor:
        """The sums of channels times ``factor``."""

    def _merge(self, other: Moments) -> None:
        if self.sums.shape != other.sums.shape:
            raise InvalidConfig(
                f"{self.name} of {self.sums.shape[-1]} and {other.sums.shape[-1]} channels "
                "cannot be merged"
            )
        self.sums, self.rows = self.sums + other.sums, self.rows + other.rows

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "rows": self.rows, "sums": self.sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        batches, rows, sums = count_of(state), count_of(state, "rows"), entry(state, "sums", Tensor)
        square = len(set(sums.shape)) <= 1
        if sums.dtype != torch.float32 or sums.dim() != self.dimensions or not square:
            wanted = "[channels, channels]" if self.dimensions == 2 else "[channels]"
            raise InvalidConfig(
                f"'sums' is of shape {tuple(sums.shape)} and {sums.dtype}; expected {wanted} "
                "and torch.float32"
            )
        check_sums(sums, rows, batches)
        self.batches, self.rows, self.sums = batches, rows, sums


@register_statistic
class Hessian(SymmetricSums, Moments):
    """``mean(x x^T)`` of the vectors along the last dimension: ``[channels, channels]``.

    It takes ``4 channels^2`` bytes, however much data there is, and twice that during a batch.

    >>> hessian = Hessian()
    >>> hessian.observe(torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]))
    >>> hessian.mean.tolist(), hessian.rows
    ([[5.0, 1.0], [1.0, 2.0]], 2)
    """

    name = HESSIAN
    dimensions = 2

    def _summed(self, sums: Tensor | None, rows: Tensor) -> Tensor:
        return lower_sums(sums, rows)

    def _finite(self, sums: Tensor) -> bool:
        return bool(torch.isfinite(sums.diagonal()).all())  # no other is larger than two of these

    def __deepcopy__(self, memo: Any) -> Hessian:
        copied = type(self)()
        copied.batches, copied.rows = self.batches, self.rows
        copied._share(self)
        return copied

    def taken(self) -> Tensor:
        """Sums that may be written to: if ``disposable`` its own, and it is empty then.

        >>> hessian = Hessian()
        >>> hessian.observe(torch.ones(2, 2))
        >>> hessian.disposable = True
        >>> hessian.taken().shape, hessian.rows
        (torch.Size([2, 2]), 0)
        """
        if not self.disposable:
            return self.sums.clone()
        sums = self.sums
        self.sums, self.rows, self.batches = torch.zeros(0, 0), 0, 0
        return sums

    def _times(self, factor: Tensor) -> Tensor:
        return self.sums * factor * factor[:, None]

    def at(self, index: Tensor) -> Hessian:
        made = self.__deepcopy__({})
        made.sums = self.sums[index][:, index]
        return made


@register_statistic
class MeanSquare(Moments):
    """``mean(x^2)`` of each index of the last dimension: ``[channels]``.

    >>> squares = MeanSquare()
    >>> squares.observe(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> squares.mean.tolist()
    [5.0, 2.0]
    """

    name = MEAN_SQUARE
    dimensions = 1
    saturates = True

    def _summed(self, sums: Tensor | None, rows: Tensor) -> Tensor:
        found = rows.square().sum(0)
        return found if sums is None else sums + found

    def _times(self, factor: Tensor) -> Tensor:
        return self.sums * factor.square()


@register_statistic
class ChannelMean(Moments):
    """The mean of each channel: over vectors, or over images of the mean over their pixels.

    Args:
        axis: of the channels, counted from the end: -1 for vectors, -3 for images.

    >>> means = ChannelMean(-3)
    >>> means.observe(torch.tensor([[[[1.0, 3.0]], [[0.0, 4.0]]]]))  # one image of two channels
    >>> means.mean.tolist()
    [2.0, 2.0]
    """

    name = "channel_mean"
    dimensions = 1
    saturates = True

    def __init__(self, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis

    @property
    def purpose(self) -> str:
        """What it is for, as states name it."""
        return channel_mean(self.axis)

    @property
    def label(self) -> str:
        """It among the means of one tensor."""
        return str(self.axis)

    @property
    def channels(self) -> int:
        """How many there are."""
        return self.sums.numel()

    def _rows(self, x: Tensor) -> Tensor:
        if self.axis < -1 and x.numel() and x.dim() >= -self.axis:
            x = x.flatten(self.axis + 1).mean(-1)
        return super()._rows(x)

    def _summed(self, sums: Tensor | None, rows: Tensor) -> Tensor:
        found = rows.sum(0)
        return found if sums is None else sums + found

    def _times(self, factor: Tensor) -> Tensor:
        return self.sums * factor

    def _empty(self: _C) -> _C:
        return type(self)(self.axis)

    def _merge(self, other: Moments) -> None:
        if not isinstance(other, ChannelMean) or other.axis != self.axis:
            raise InvalidConfig("means of channels along other dimensions cannot be merged")
        super()._merge(other)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"axis": self.axis}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        axis: int = entry(state, "axis", int)
        if isinstance(axis, bool) or not -4 <= axis <= -1:
            raise InvalidConfig(f"'axis' is {axis!r}; expected -4 to -1")
        super().load_state_dict(state)
        self.axis = axis
