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
from torch_quant.graph.capture import Region, Reopened
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


def comparable(region: Region) -> bool:
    """Whether the float module may be run beside: it keeps no state, and no hook would notice."""
    return not any(each.state or any(each.hooks.values()) for each in region.walk())


def disagrees(region: Region, inputs: tuple[Any, dict[str, Any]], outputs: Any) -> bool:
    """Whether ``outputs`` are not those of the region's float module, up to rounding.

    Args:
        region: keeps no state.
        inputs: ``(args, kwargs)``; they may be changed.
        outputs: what ran in its place gave.
    """
    args, kwargs = inputs
    with CAPTURING, frozen(region.module):
        expected, _ = flatten_output(region.module(*args, **kwargs))
    actual, _ = flatten_output(outputs)
    return len(actual) != len(expected) or any(
        difference(x, y)[1] for x, y in zip(actual, expected, strict=True)
    )


def raises(region: Region, inputs: tuple[Any, dict[str, Any]]) -> bool:
    """Whether the region's float module itself raises on them."""
    args, kwargs = inputs
    try:
        with CAPTURING, frozen(region.module):
            region.module(*args, **kwargs)
    except Exception:  # whatever it is: it is the model's own
        return True
    return False


class _Found(Exception):
    """The innermost region that disagrees, and the call at which it does."""

    def __init__(self, region: Region, call: Call | None) -> None:
        self.region, self.call = region, call


class _Comparing(Executor):
    def execute(self, *args: Any, **kwargs: Any) -> Any:
        kept = copied((args, kwargs))
        try:
            outputs = Executor.execute(self, *args, **kwargs)
        except (_Found, Reopened, QuantError):
            raise
        except Exception as error:  # whatever the code between the pieces raises
            raise _Found(self.region, _call(self.region, args, kwargs)) from error
        with no_fastpath():
            if comparable(self.region) and disagrees(self.region, kept, outputs):
                raise _Found(self.region, _call(self.region, args, kwargs))
        return outputs


def _call(region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    try:
        return flatten_call(*region.bound(args, kwargs))
    except CaptureFailed:
        return None  # no graph can have served it


def _run(region: Region, graph: CapturedGraph, call: Call) -> Any:
    return graph(call)


@torch.no_grad()
def settle(region: Region, inputs: tuple[Any, dict[str, Any]]) -> None:
    """Change how the innermost region that disagrees at this call runs; the whole if none does."""
    args, kwargs = copied(inputs)
    try:
        _Comparing(region, _run)(*args, **kwargs)
    except Reopened:
        return
    except _Found as found:
        found.region.distrust(found.call)
    else:
        region.distrust(None)
