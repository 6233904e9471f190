"""Whether a module of the user's is what the saved one was made of: its class and sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from torch_quant.algorithms.outlier_split import grown_sizes
from torch_quant.errors import InvalidConfig
from torch_quant.nn.stand_in import class_of
from torch_quant.ops.functions import path_of

__all__ = ["check_fit"]


def check_fit(
    theirs: nn.Module | None,
    path: str,
    kind: str,
    children: Collection[str],
    saved: Mapping[str, Tensor],
) -> None:
    """Raise :class:`InvalidConfig` unless a module fits what was saved in its place.

    Args:
        theirs: the module, None where the model has none; it may be on the meta device.
        path: its name in the model.
        kind: the class of the saved one.
        children: names of the saved one's modules.
        saved: every saved tensor by its name.
    """
    given = path_of(nn.Module if theirs is None else class_of(theirs))
    if given != kind:
        where = f"its module {path}" if path else "it"
        raise InvalidConfig(
            f"the model does not fit the saved one: {where} is a {given}; expected a {kind}"
        )
    if theirs is not None and (why := _misfit(theirs, path, children, saved)):
        raise InvalidConfig(
            f"the model does not fit the saved one: {why}. Give one of the same configuration"
        )


def _misfit(
    theirs: nn.Module, path: str, children: Collection[str], saved: Mapping[str, Tensor]
) -> str:
    """What of a module does not fit what was saved in its place, empty if all does.

    Integers may lie transposed or, several in a byte, packed along their last dimension; channels
    may have copies.

    >>> import torch
    >>> saved = {"head.weight": torch.zeros(2, 8, dtype=torch.int8)}
    >>> _misfit(nn.Linear(8, 5), "head", (), saved)
    'head.weight is (5, 8); expected (2, 8)'
    >>> _misfit(nn.Linear(8, 2), "head", (), saved)
    ''
    """
    more = [name for name, child in theirs._modules.items() if child and name not in children]
    if more:
        return f"it has a module {'.'.join(filter(None, (path, more[0])))}, which that has not"
    for name, x in theirs._parameters.items():
        there = saved.get(f"{path}.{name}".strip("."))
        if x is None or there is None or there.dim() != x.dim():
            continue
        sizes, expected = tuple(x.shape), tuple(there.shape)
        packed = sizes[:-1] == expected[:-1] and expected[-1:] < sizes[-1:]
        if packed and not there.is_floating_point():
            continue
        if sorted(sizes) != sorted(expected) and not _is_grown(sizes, expected, saved):
            return f"{'.'.join(filter(None, (path, name)))} is {sizes}; expected {expected}"
    return ""


def _is_grown(
    sizes: tuple[int, ...], expected: tuple[int, ...], saved: Mapping[str, Tensor]
) -> bool:
    """Whether ``expected`` are ``sizes`` but for copies of channels, transposed or not."""
    grown = grown_sizes(saved)
    return any(
        all(
            size == other or (size, other) in grown
            for size, other in zip(sizes, order, strict=True)
        )
        for order in {expected, expected[::-1]}
    )
