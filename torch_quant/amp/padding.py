"""Which positions of a padded batch are real, so that no others count in scores.

Where the outputs at padding are left out of what is differentiated, and attention excludes padding,
gradients there are 0: noise at padding then adds nothing to a score.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_quant.errors import InvalidConfig
from torch_quant.proxies.values import describe

__all__ = ["Mask", "Real", "Widths", "batch_of", "kept_outputs", "real_positions"]

logger = logging.getLogger("torch_quant")

Mask = str | Callable[[Any], Tensor]
"""The name of the input that tells real positions from padding, or what gives that of a batch."""


@dataclass
class Widths:
    """What an AMP proxy has seen of masks and of matrices beside them, over all its batches.

    Args:
        lengths: name of a matrix ``[rows, width]`` -> the lengths that its width was.
        others: matrices whose width was once another than the length.
        used: whether padding was left out of any tensor.
        padded: length of the last mask with padding, None without one.
    """

    lengths: dict[str, set[int]] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    used: bool = False
    padded: int | None = None
    _told: bool = False

    def tell(self) -> None:
        """Log a warning, once, if there is padding and no tensor had its positions."""
        if self.padded is not None and not self.used and not self._told:
            self._told = True
            logger.warning(
                "no tensor had the mask's length (%d) as an axis, so padding counts as what is "
                "real: mask=lambda batch: ... makes a mask of the length that the model computes "
                "on. Matrices [rows, length] count whole until batches of two lengths were seen",
                self.padded,
            )

    def is_length(self, name: str, length: int, width: int) -> bool:
        """Whether the width of a matrix is the length, and no number of classes that equals it.

        Two batches of different lengths show that.

        >>> widths = Widths()
        >>> widths.is_length("logits", 3, 3), widths.is_length("logits", 5, 5)
        (False, True)
        """
        if not name:
            return False
        if width == length:
            self.lengths.setdefault(name, set()).add(length)
        else:
            self.others.add(name)
        return name not in self.others and len(self.lengths[name]) > 1


@dataclass(frozen=True)
class Real:
    """The real positions of a batch.

    Args:
        positions: bool of shape ``[rows, length]``; None where all are real.
        widths: of the proxy.
    """

    positions: Tensor | None = None
    widths: Widths = field(default_factory=Widths)

    def kept(self, x: Tensor, name: str = "", whole: Tensor | None = None) -> Tensor:
        """``x`` with zeros at padding.

        Args:
            x: of shape ``[rows, heads, length, ...]``, ``[rows, length, ...]`` of three dimensions
                and more, or ``[rows * length, ...]``; others are given back as they are. The rows
                may be the first ones only.
            name: of the tensor. One of shape ``[rows, length]`` has to have one, by which
                :class:`Widths` knows that its width is the length.
            whole: that ``x`` is the first rows of.

        >>> real = Real(torch.tensor([[True, False]]))
        >>> real.kept(torch.ones(1, 2, 3)).sum(), real.kept(torch.ones(1, 5)).sum()
        (tensor(3.), tensor(5.))
        """
        sizes = (x if whole is None else whole).shape
        mask = None if self.positions is None or x.dim() == 0 else self._mask(sizes, name)
        if mask is None:
            return x
        self.widths.used = True
        return torch.where(mask.to(x.device)[: len(x)], x, torch.zeros((), dtype=x.dtype))

    def _mask(self, sizes: torch.Size, name: str) -> Tensor | None:
        """The positions as a tensor of these sizes has them, None where it has no such axis."""
        assert self.positions is not None
        rows, length = self.positions.shape
        count, rank = sizes[0], len(sizes)
        if count > rows:
            shape = [count, *[1] * (rank - 1)]
            return self.positions.reshape(shape) if count == rows * length else None
        if rank > 3 and sizes[2] == length:
            return self.positions.reshape(rows, 1, length, *[1] * (rank - 3))
        if rank > 2 and sizes[1] == length:
            return self.positions.reshape(rows, length, *[1] * (rank - 2))
        if rank == 2 and self.widths.is_length(name, length, sizes[1]):
            return self.positions
        return None


def kept_outputs(real: Real, outputs: Iterable[Tensor]) -> list[Tensor]:
    """Outputs of a model with zeros at padding; by their places, as :class:`Widths` names them."""
    return [real.kept(x.detach(), f"output {i}") for i, x in enumerate(outputs)]


def batch_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What functions of the user's are given as the batch.

    >>> batch_of((1,), {}), batch_of((1, 2), {}), batch_of((), {"x": 1})
    (1, (1, 2), {'x': 1})
    """
    return kwargs if not args else args[0] if len(args) == 1 and not kwargs else args


def real_positions(
    mask: Mask | None,
    signature: inspect.Signature,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    rows: int,
    widths: Widths,
) -> Real:
    """The real positions of one batch; all where nobody tells, or this batch has no mask.

    Args:
        mask: as in :meth:`Quantizer.amp`.
        signature: of the model's forward.
        args: of the batch.
        kwargs: of the batch.
        rows: how many samples it has.
        widths: of the proxy.

    Raises:
        InvalidConfig: the model has no such input; the mask is none, or has other values than 0
            and 1.
    """
    if mask is None:
        return Real()
    if isinstance(mask, str):
        what = f"the input {mask!r}"
        found = signature.bind_partial(*args, **kwargs).arguments
        given = {**kwargs, **found}
        if mask not in given:
            names = [name for name in signature.parameters if name != "self"]
            if mask not in names:
                raise InvalidConfig(
                    f"mask={mask!r}: the model has no input of that name; expected one of "
                    f"{', '.join(names)}, or a function of the batch"
                )
            return Real()
        value = given[mask]
        if value is None:
            return Real()
    else:
        what, value = "mask(batch)", mask(batch_of(args, kwargs))
    if not isinstance(value, Tensor) or value.dim() != 2 or len(value) != rows:
        raise InvalidConfig(
            f"{what} is {describe(value)}; expected a tensor [{rows}, length], 1 at real positions "
            "and 0 at padding: mask=lambda batch: ... makes one"
        )
    if not bool(((value == 0) | (value == 1)).all()):
        raise InvalidConfig(
            f"{what} has values other than 0 and 1, between {value.amin():g} and "
            f"{value.amax():g}; expected 1 at real positions and 0 at padding, not what is added "
            "to attention's scores: mask=lambda batch: ... makes one"
        )
    if not bool((value == 1).all()):
        widths.padded = value.shape[1]
    return Real(value != 0, widths)
