"""A model in pieces against the float module: does what runs give what it stands for?

A graph is compared when it is captured. Python code over pieces is compared here, at its first call
of each kind: it may read from a child what only the child's own Python would have written.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torch_quant.errors import CaptureFailed, QuantError
from torch_quant.graph.calls import Call, flatten_call
from torch_quant.graph.capture import CapturedModule, Reopened
from torch_quant.graph.executor import Executor
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.outputs import flatten_output
from torch_quant.graph.running import CAPTURING, frozen, no_fastpath
from torch_quant.graph.verification import difference
from torch_quant.proxies.values import copied

__all__ = ["comparable", "disagrees", "kind_of", "raises", "settle"]

logger = logging.getLogger("torch_quant")


def kind_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What calls of one kind have in common."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    facts = ((x.dtype, x.dim()) if isinstance(x, Tensor) else type(x) for x in leaves)
    return repr(spec), tuple(facts)


def comparable(submodule: CapturedModule) -> bool:
    """Whether the float module may be run beside: it keeps no state, and no hook would notice."""
    return not any(each.state or any(each.hooks.values()) for each in submodule.walk())


def disagrees(
    submodule: CapturedModule, inputs: tuple[Any, dict[str, Any]], outputs: Any, random: Tensor
) -> bool:
    """Whether ``outputs`` are not those of its float module, up to rounding.

    Args:
        submodule: keeps no state.
        inputs: ``(args, kwargs)``; they may be changed.
        outputs: what ran in its place gave.
        random: the state of PyTorch's random numbers that this began with.
    """
    args, kwargs = inputs
    with CAPTURING, frozen(submodule.module):
        torch.set_rng_state(random)
        expected, _ = flatten_output(submodule.module(*args, **kwargs))
    actual, _ = flatten_output(outputs)
    return len(actual) != len(expected) or any(
        difference(x, y)[1] for x, y in zip(actual, expected, strict=True)
    )


def raises(submodule: CapturedModule, inputs: tuple[Any, dict[str, Any]]) -> bool:
    """Whether its float module itself raises on them."""
    args, kwargs = inputs
    try:
        with CAPTURING, frozen(submodule.module):
            submodule.module(*args, **kwargs)
    except Exception:  # whatever it is: it is the model's own
        return True
    return False


class _Found(Exception):
    """The innermost module that disagrees, and the call at which it does."""

    def __init__(self, submodule: CapturedModule, call: Call | None) -> None:
        self.submodule, self.call = submodule, call


class _Comparing(Executor):
    def execute(self, *args: Any, **kwargs: Any) -> Any:
        kept, random = copied((args, kwargs)), torch.get_rng_state()
        try:
            outputs = Executor.execute(self, *args, **kwargs)
        except (_Found, Reopened, QuantError):
            raise
        except Exception as error:  # whatever the code between the pieces raises
            raise _Found(self.submodule, _call(self.submodule, args, kwargs)) from error
        with no_fastpath():
            if comparable(self.submodule) and disagrees(self.submodule, kept, outputs, random):
                raise _Found(self.submodule, _call(self.submodule, args, kwargs))
        return outputs


def _call(submodule: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    try:
        return flatten_call(*submodule.bound(args, kwargs))
    except CaptureFailed:
        return None  # no graph can have served it


def _run(submodule: CapturedModule, graph: CapturedGraph, call: Call) -> Any:
    return graph(call)


@torch.no_grad()
def settle(submodule: CapturedModule, inputs: tuple[Any, dict[str, Any]], random: Tensor) -> bool:
    """Change how the innermost module that disagrees at this call runs; the whole if none does.

    Args:
        submodule: what was called.
        inputs: ``(args, kwargs)`` of the call.
        random: the state of PyTorch's random numbers that the call began with.

    Returns:
        Whether anything was changed: what runs as the float module itself already, and gives
        another result at each call, cannot be compared.
    """
    args, kwargs = copied(inputs)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(random)
        try:
            _Comparing(submodule, _run)(*args, **kwargs)
        except Reopened:
            return True
        except _Found as found:
            wrong, call = found.submodule, found.call
        else:
            wrong, call = submodule, None
    if wrong.plain:
        logger.warning(
            "%s: it gives another result each time that it is called with the same inputs, so what "
            "runs is not compared with it",
            wrong.path or "the model",
        )
        return False
    wrong.distrust(call)
    return True
