"""A captured graph against its module: at the example, at other batch sizes, and at size 1."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_quant.errors import CaptureFailed
from torch_quant.graph.calls import Call
from torch_quant.graph.outputs import with_given
from torch_quant.graph.running import Writes, copied, frozen, run_module
from torch_quant.graph.shapes import ShapeContract

if TYPE_CHECKING:
    from torch_quant.graph.export import CapturedGraph

__all__ = [
    "batch_size",
    "difference",
    "exact_unmasked",
    "masked",
    "other_sizes",
    "repeat",
    "takes_another_path",
    "try_size_one",
    "verify",
    "verify_other",
]

logger = logging.getLogger("torch_quant")

ROUNDING = 2.0**-14
"""Largest difference, relative to the largest value, that another order of sums explains."""
_MOST_TRIALS = 24
"""Sizes of 1 that are tried: a decoder's cache may have hundreds of free sizes."""


def other_sizes(module: nn.Module, call: Call, writes: Writes) -> list[tuple[Call, list[Any]]]:
    """The call at other batch sizes, with the module's outputs; without those it refuses."""
    batch, found = batch_size(call), []
    sizes = [repeat(call, 3)] if batch == 1 else [repeat(call, 2), _first_row(call)]
    for other in sizes:
        try:
            found.append((other, run_module(module, other, writes=writes)))
        except Exception as error:  # the model's own refusal, whatever it raises
            logger.debug("the float model does not take another batch size: %s", error)
    return found


def _first_row(call: Call) -> Call:
    batch = batch_size(call)
    return call.with_tensors(
        tuple(x[:1] if x.dim() and x.shape[0] == batch else x for x in call.tensors)
    )


def exact_unmasked(module: nn.Module, graph: CapturedGraph, call: Call) -> bool:
    """Whether the graph is exact without masking too.

    Code that looks at a mask and drops it when it is all ones does not do so while being exported,
    and another kernel may sum in another order.
    """
    if not masked(call):
        return True
    tensors = (torch.ones_like(x) if _is_mask(x) else x for x in call.tensors)
    unmasked = call.with_tensors(tuple(tensors))
    try:
        return verify(graph, unmasked, run_module(module, unmasked, writes=graph.writes))
    except Exception as error:  # zeros and ones that are no mask may not be a valid input
        logger.debug("not run without its masks: %s", error)
        return True


def masked(call: Call) -> bool:
    """Whether one of its tensors may be a mask."""
    return any(_is_mask(x) for x in call.tensors)


def _is_mask(x: Tensor) -> bool:
    return not x.is_floating_point() and x.numel() > 0 and bool(((x == 0) | (x == 1)).all())


def batch_size(call: Call) -> int:
    return next((x.shape[0] for x in call.tensors if x.dim()), 0)


def repeat(call: Call, times: int) -> Call:
    """``call`` with every tensor of its batch size repeated along the first dimension."""
    batch = batch_size(call)
    return call.with_tensors(
        tuple(
            torch.cat([x] * times) if x.dim() and x.shape[0] == batch else x for x in call.tensors
        )
    )


def verify_other(graph: CapturedGraph, call: Call, expected: list[Any]) -> None:
    """Verify at another batch size; what the graph then turns out not to rely on is dropped."""
    contract = graph.contract
    graph.contract = contract.allowing(call)
    try:
        verify(graph, call, expected)
    except Exception:
        graph.contract = contract
        raise


def try_size_one(module: nn.Module, graph: CapturedGraph, call: Call) -> None:
    """Run graph and module with free sizes at 1, and have the contract say what was found.

    Exporting leaves conditions such as ``s1 > 1`` behind, on which the graph may rely or not. Where
    it gives the module's output, just the sizes that were tried are allowed; where it does not,
    they are refused.
    """
    proven: list[dict[str, int]] = []
    for change in _ones(graph.contract, call):
        other = graph.contract.resized(call, change)
        if other is None:
            continue
        try:
            expected = run_module(module, other, writes=graph.writes)
        except Exception as error:  # the model's own refusal, whatever it raises
            logger.debug("the float model does not take %s: %s", change, error)
            continue
        contract = graph.contract
        fits = contract.mismatch(other) is None
        values = contract.values(other)
        try:
            graph.contract = contract.allowing(other)
            exact = verify(graph, other, expected)
        except Exception as error:  # a wrong size may fail in any operator
            logger.debug("captured, but not for %s: %s", change, error)
            graph.contract = contract.refusing({s: values[s] for s in change}) if fits else contract
            continue
        graph.contract = contract
        graph.exact &= exact
        if not fits:
            proven.append(values)
    graph.contract = graph.contract.proven(proven)


def _ones(contract: ShapeContract, call: Call) -> list[dict[str, int]]:
    """Free sizes to be set to 1: each, all of one size together, and each of that at batch 1."""
    values = contract.values(call)
    sizes = [[name] for name, value in values.items() if value > 1]
    for size in dict.fromkeys(values.values()):
        together = [name for name, value in values.items() if value == size > 1]
        if len(together) > 1:
            sizes.append(together)
    first = next((str(s) for shape in contract.shapes for s in shape[:1] if s in values), "")
    if values.get(first, 1) > 1:
        sizes += [[first, *names] for names in sizes if first not in names]
    sizes.sort(key=lambda names: -len(names) if len(sizes) > _MOST_TRIALS else 0)
    return [dict.fromkeys(names, 1) for names in sizes[:_MOST_TRIALS]]


def takes_another_path(graph: CapturedGraph, call: Call) -> bool:
    """Whether only a condition (``if x.shape[0] > 3``) keeps the graph from serving ``call``."""
    bare = ShapeContract(graph.contract.names, graph.contract.shapes)
    return bare.mismatch(call) is None


def verify(graph: CapturedGraph, call: Call, expected: list[Any]) -> bool:
    """Whether the graph gives ``expected`` bit for bit; raises unless it does so up to rounding."""
    graph.contract.check(call)
    with frozen(graph.gm):  # not by fx's own call, which prints what fails, as sizes of 1 may
        results = nn.Module.__call__(graph.gm, *copied(call).tensors)
    actual = with_given(results, graph.out_spec, call.constant)
    if len(actual) != len(expected):
        raise CaptureFailed(f"the graph gives {len(actual)} outputs, the module {len(expected)}")
    same = [_same(x, y) for x, y in zip(actual, expected, strict=True)]
    return all(same)


def difference(actual: Any, expected: Any) -> tuple[bool, str]:
    """How one output compares: whether it is bit-equal, and what differs beyond float rounding."""
    if not isinstance(expected, Tensor):
        if actual != expected and not actual != actual != expected != expected:
            return False, f"the graph gives {actual!r} where the module gives {expected!r}"
        return True, ""
    if not isinstance(actual, Tensor):
        return False, f"the graph gives {actual!r} where the module gives a tensor"
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False, (
            f"the graph gives {tuple(actual.shape)} {actual.dtype}, "
            f"the module {tuple(expected.shape)} {expected.dtype}"
        )
    x, y = actual.detach().nan_to_num(), expected.detach().nan_to_num()
    if torch.equal(x, y):
        return True, ""
    gap = float((x - y).abs().max()) if x.is_floating_point() else torch.inf
    if not x.is_floating_point() or gap > ROUNDING * float(y.abs().max()):
        return False, f"the graph's output differs from the module's by up to {gap:.3g}"
    return False, ""


def _same(actual: Any, expected: Any) -> bool:
    """Bit equality of one output; raises where more than float rounding differs."""
    equal, wrong = difference(actual, expected)
    if wrong:
        raise CaptureFailed(wrong)
    return equal
