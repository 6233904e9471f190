"""Each kind of model is exported once a process: that is most of what most tests cost.

What is kept is a copy of the graph, under all that it was made of: the module's classes,
attributes and tensors, its place in the model, the call and its free sizes, the graphs that the
module had already, and what of PyTorch's state decides on kernels and paths. Where all of that is
the same, a new module gets a copy of its own, whose tensors are that module's. So no test sees
another. Which module is a graph, which call it serves and what is in pieces is still worked out
each time. Exported anew each time are modules that cannot be pickled, such as write to themselves
or to their arguments, and those that take too long, as there is a warning then. Tests of captures
export anew, but for what ``calibrated`` takes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_quant.graph import capture, widen
from torch_quant.graph.calls import Call
from torch_quant.graph.export import CapturedGraph, export_graph
from torch_quant.graph.running import fastpath_wanted
from torch_quant.model import rebind

__all__ = ["content", "exported", "exported_anew", "shared_exports"]

_MOST = 160
_KEPT: OrderedDict[bytes, tuple[list[int], list[int], CapturedGraph]] = OrderedDict()


class _Contents(pickle.Pickler):
    """Writes tensors by value; torch's own way writes addresses too."""

    def reducer_override(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return NotImplemented
        values = x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        kind = (type(x).__name__, tuple(x.shape), x.stride(), str(x.dtype), x.requires_grad)
        return str, (f"{kind} {hashlib.sha256(values).hexdigest()}",)


def content(module: nn.Module, call: Any) -> bytes | None:
    """What a capture of ``module`` on ``call`` depends on, or None if that cannot be told."""
    state = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        fastpath_wanted(),
        "intel_extension_for_pytorch" in sys.modules,  # it replaces kernels
    )
    buffer = io.BytesIO()
    try:
        _Contents(buffer, protocol=5).dump((module, call, state))
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
        return None
    return hashlib.sha256(buffer.getvalue()).digest()


@contextlib.contextmanager
def shared_exports() -> Iterator[None]:
    """Have captured modules take what was exported before of an equal module for an equal call."""
    export = capture.export_call
    if export.__name__ == "shared":
        yield
        return

    def shared(module: nn.Module, call: Call, known: Any = (), **options: Any) -> Any:
        earlier = [(str(kind), repr(graph.contract)) for kind, graph in known]
        given = {**options, "free": options["free"](call)}
        key = content(module, (call.leaves, call.nesting, earlier, given))
        if key is None:
            return export(module, call, known, **options)
        if key in _KEPT:
            _KEPT.move_to_end(key)
            numbers, unread, kept = _KEPT[key]
            graph = _copied(kept)
            rebind(graph.gm, module)
            return call.widened(numbers, unread), graph
        wide, graph = export(module, call, known, **options)
        if not (graph.writes or graph.leaves_behind or graph.reduced):
            _KEPT[key] = sorted(wide.numbers), sorted(wide.unread), _copied(graph)
            if len(_KEPT) > _MOST:
                _KEPT.popitem(last=False)
        return wide, graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "export_call", shared)
        yield


def exported(module: nn.Module, call: Call) -> CapturedGraph:
    """The graph of a module, in eval mode, for a call."""
    key = content(module, (call.leaves, call.nesting))
    if key is None:
        return export_graph(module, call)
    if key not in _KEPT:
        _KEPT[key] = [], [], _copied(export_graph(module, call))
    graph = _copied(_KEPT[key][2])
    rebind(graph.gm, module)
    return graph


@contextlib.contextmanager
def exported_anew() -> Iterator[None]:
    """Have them export for themselves, whatever the others have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "export_call", widen.export_call)
        yield


def _copied(graph: CapturedGraph) -> CapturedGraph:
    return dataclasses.replace(graph, gm=copy.deepcopy(graph.gm))
