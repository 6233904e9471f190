"""A segment of a graph as a block: its samples are rows of batches, where rows are independent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_quant.algorithms.blocks import Block, Layer, Part, Sample
from torch_quant.core.metrics import sqnr
from torch_quant.rounding.segments import Segment

__all__ = ["SegmentBlock", "independent_rows", "rows_of"]

_TOGETHER = 32
"""Rows that are computed at once where all are."""
_SAME = 20.0
"""SQNR, dB, from which results are the same: other sums may round a few activations otherwise."""


def rows_of(tensors: Iterable[Tensor]) -> int:
    """The first size of the first tensor that has one, else 1."""
    return next((len(x) for x in tensors if x.dim()), 1)


class SegmentBlock(Block):
    """A segment as a block; rows of the same sizes are computed together."""

    @classmethod
    def of(
        cls,
        segment: Segment,
        layers: tuple[Layer, ...],
        given: Sequence[tuple[Tensor, ...]],
        targets: Sequence[Tensor],
        importance: Sequence[Tensor] | None,
        rows: Sequence[int] | None,
    ) -> SegmentBlock:
        """The calls of a segment, row by row where that can be.

        Args:
            segment: it.
            layers: those to round.
            given: the arguments of each call.
            targets: what each should give.
            importance: what errors count in each; None for 1.
            rows: of each call; None where the graph takes no other number of rows.
        """
        divisible = rows is not None and all(
            x.dim() and len(x) == count
            for args, target, count in zip(given, targets, rows, strict=True)
            for x in (*args, target)
        )
        if divisible and independent_rows(segment.module, max(given, key=rows_of)):
            given = [row for args in given for row in zip(*(x.split(1) for x in args), strict=True)]
            targets = [row for x in targets for row in x.split(1)]
            if importance is not None:
                importance = [row for x in importance for row in x.split(1)]
        else:
            divisible = False
        samples = [Sample(args, {"divisible": divisible}, 0) for args in given]
        made = cls(segment.name, segment.module, layers, samples, list(targets))
        made.importance = None if importance is None else list(importance)
        return made

    def gathered(self, chosen: Iterable[int]) -> Iterator[Part]:
        """Some rows, put together, or a whole batch where a batch cannot be divided."""
        groups: dict[Any, list[int]] = {}
        for i in chosen:
            sample = self.samples[i]
            sizes = tuple(x.shape for x in sample.args)
            groups.setdefault(sizes if sample.kwargs["divisible"] else i, []).append(i)
        for group in groups.values():
            for start in range(0, len(group), _TOGETHER):
                yield self._part(group[start : start + _TOGETHER])

    def _part(self, numbers: Sequence[int]) -> Part:
        assert self.targets is not None
        args = zip(*(self.samples[i].args for i in numbers), strict=True)
        sample = Sample(tuple(map(_together, args)), {}, 0)
        target = _together([self.targets[i] for i in numbers])
        counts = None if self.importance is None else [self.importance[i] for i in numbers]
        importance = None if counts is None else _together(counts)
        return Part(sample, target, importance, tuple(numbers))

    def call(self, sample: Sample) -> Any:
        """What the segment gives."""
        return self.module(*sample.args)


def independent_rows(module: nn.Module, args: tuple[Tensor, ...]) -> bool:
    """Whether each row of a result depends on the same row of the arguments alone.

    It is tried: with three rows by themselves, and with one row twice. The first size of a tensor
    can be a sequence's length, and a model can compare the examples of a batch.

    Args:
        module: gives one tensor.
        args: of a call, of the same number of rows, 1 or more.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> independent_rows(nn.Softmax(1), (x,)), independent_rows(nn.Softmax(0), (x,))
    (True, False)
    """
    count = rows_of(args)
    places = sorted({0, count // 2, count - 1})
    with torch.no_grad():
        whole = module(*args)
        rows = [module(*(x[i : i + 1] for x in args)) for i in places]
        twice = module(*(torch.cat([x[:1], x[:1]]) for x in args))
    pairs = [(whole[i : i + 1], row) for i, row in zip(places, rows, strict=True)]
    pairs.append((torch.cat([rows[0], rows[0]]), twice))
    return all(x.shape == y.shape and sqnr(x, y) > _SAME for x, y in pairs)


def _together(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
