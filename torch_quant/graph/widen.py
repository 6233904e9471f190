"""Capture for as many calls as one graph can serve: its numbers as inputs, unread constants out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from torch_quant.errors import CaptureFailed
from torch_quant.graph.calls import Call
from torch_quant.graph.effects import KeepsState
from torch_quant.graph.export import CapturedGraph, ModelRefuses, NumbersUntried, export_graph
from torch_quant.graph.kinds import Kind, fits_a_tensor
from torch_quant.graph.running import run_module
from torch_quant.graph.verification import verify

__all__ = ["check_constants", "export_call"]

logger = logging.getLogger("torch_quant")


def export_call(
    module: nn.Module,
    call: Call,
    known: Sequence[tuple[Kind, CapturedGraph]] = (),
    *,
    path: str = "",
    free: Callable[[Call], list[frozenset[int]] | None] = lambda call: None,
) -> tuple[Call, CapturedGraph]:
    """Capture ``module`` for calls like ``call``, whatever their numbers and strings if possible.

    An int or float becomes an input of the graph where the module's code computes with it and does
    not branch on it. A string is left out where nothing reads it. Any other constant is fixed.

    Args:
        module: a twin, in eval mode.
        call: what it was called with.
        known: the graphs that were captured of it before.
        path: of the module in the whole model.
        free: gives the dimensions of each tensor that may be free; None for all.

    Returns:
        The call as the graph takes it, and the graph.

    Raises:
        ModelRefuses: the float module raises on ``call``.
        KeepsState: it keeps something between calls.
        CaptureFailed: as for :func:`export_graph`.
    """
    leaves = list(enumerate(call.leaves))
    numbers = {i for i, x in leaves if type(x) in (int, float) and fits_a_tensor(x)}
    unread = {i for i, x in leaves if type(x) in (str, bytes)}
    while numbers or unread:
        wide = call.widened(sorted(numbers), sorted(unread))
        try:
            graph = export_graph(module, wide, _alike(known, wide), path=path, free=free(wide))
            if not wide.uses.read:
                _check_other_numbers(module, graph, wide)
                return wide, graph
        except (KeepsState, ModelRefuses):
            raise
        except NumbersUntried as error:
            logger.debug("not captured for every number: %s", error)
            numbers.clear()
            continue
        except CaptureFailed as error:
            logger.debug("not captured for every number and string: %s", error)
            if not _narrow(wide, numbers, unread, error):
                raise
        unread -= wide.uses.read
    return call, export_graph(module, call, _alike(known, call), path=path, free=free(call))


def _alike(known: Sequence[tuple[Kind, CapturedGraph]], call: Call) -> list[CapturedGraph]:
    kind = call.signature
    return [graph for each, graph in known if each == kind]


def _narrow(wide: Call, numbers: set[int], unread: set[int], error: CaptureFailed) -> bool:
    """Give up what the failure may be due to; False if it is surely due to something else."""
    if wide.uses.read:
        return True
    cause = error.__cause__
    condition = getattr(cause, "cond", None)  # of GuardOnDataDependentSymNode
    symbols = {str(symbol) for symbol in getattr(condition, "free_symbols", ())}
    guilty = {wide.uses.symbols[name] for name in symbols & set(wide.uses.symbols)}
    if symbols and not guilty:
        return False
    numbers -= guilty or set(numbers)
    if not guilty:  # code in C reads a constant without a word: it wants its very type
        unread.clear()
    return True


def _check_other_numbers(module: nn.Module, graph: CapturedGraph, call: Call) -> None:
    """Raise unless the graph gives the module's output for other numbers too.

    Code may ask for the type of a number, which is a symbol's while it is exported.
    """
    served = [_check_serves(module, graph, _with_numbers(call, others)) for others in _OTHERS]
    if call.numbers and not any(served):
        raise CaptureFailed("the model takes no other number than that of the example")


def _check_serves(module: nn.Module, graph: CapturedGraph, call: Call) -> bool:
    """Raise unless the graph gives for ``call`` what the module gives; False if that refuses it.

    Raises:
        CaptureFailed: another output; where the graph was exact, it must be so here too.
    """
    try:
        expected = run_module(module, call, writes=graph.writes)
    except Exception as error:  # the model's own refusal, whatever it raises
        logger.debug("the float model does not take these inputs: %s", error)
        return False
    if not verify(graph, call, expected) and graph.exact:
        raise CaptureFailed("the graph gives the module's output up to rounding only")
    return True


_OTHERS: tuple[tuple[Callable[[Any], Any], Callable[[Any], Any]], ...] = (
    (lambda x: x + 1, lambda x: 0.37 * x + 0.51),
    (lambda x: 0, lambda x: 0.0),
    (lambda x: -x - 3, lambda x: -1.5 * x - 1.3),
)
"""Other values to try: of an int, of a float."""


def _with_numbers(call: Call, others: tuple[Callable[[Any], Any], ...]) -> Call:
    tensors = list(call.tensors)
    for place, position in enumerate(call.positions):
        if position in call.numbers:
            number = tensors[place]
            change = others[number.is_floating_point()]
            tensors[place] = torch.tensor(change(number.item()), dtype=number.dtype)
    return call.with_tensors(tuple(tensors))


_TOLD, _LIMIT = 4, 16
"""For how many values of a constant a module is captured before that is told, and at most."""


def check_constants(kinds: Sequence[Kind], call: Call, where: str, *, splits: bool = True) -> None:
    """Tell which constant makes a module be captured again and again.

    Args:
        kinds: what it was captured for.
        call: what it will be captured for now.
        where: the module.
        splits: whether the caller captures its parts where this raises, which is told then.

    Raises:
        CaptureFailed: it was captured for too many values already.
    """
    alike = [kind for kind in kinds if call.distance(kind) == 2 * len(call.constants(kind))]
    if len(alike) != _TOLD and len(alike) < _LIMIT:
        return
    names, varied = call.paths(), {i for kind in alike for i in call.constants(kind)}
    found = (
        f"{where} is captured anew for every value of {', '.join(names[i] for i in sorted(varied))}"
        f" ({len(alike)} so far), since its code branches on it or an operator needs to know it"
    )
    if len(alike) >= _LIMIT:
        if splits:
            logger.warning("%s; from now on its parts are captured, not the whole", found)
        raise CaptureFailed(found)
    logger.warning("%s; give it as a tensor if you can", found)
