"""Each kind of model is captured once a process: that is nine tenths of what most tests cost.

What is kept is a copy of the graph, under all that it was made of: the model's classes, attributes
and tensors, the batches, and what of PyTorch's state decides on kernels. Where all of that is the
same, a new model gets a copy of its own, whose tensors are that model's. So no test sees another.
Models in pieces are captured anew each time, and so are those that cannot be pickled.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import pickle
import sys
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from torch_quant.graph.capture import CapturedModule
from torch_quant.graph.export import CapturedGraph
from torch_quant.model import rebind

__all__ = ["content", "keep", "restore"]

_MOST = 48
_Graphs = list[tuple[Any, CapturedGraph]]
_KEPT: OrderedDict[bytes, _Graphs] = OrderedDict()


class _Contents(pickle.Pickler):
    """Writes tensors by value; torch's own way writes addresses too."""

    def reducer_override(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return NotImplemented
        values = x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        kind = (type(x).__name__, tuple(x.shape), x.stride(), str(x.dtype), x.requires_grad)
        return str, (f"{kind} {hashlib.sha256(values).hexdigest()}",)


def content(model: nn.Module, batches: Any) -> bytes | None:
    """What a capture of ``model`` on ``batches`` depends on, or None if that cannot be told."""
    state = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        "intel_extension_for_pytorch" in sys.modules,  # it replaces kernels
    )
    buffer = io.BytesIO()
    try:
        _Contents(buffer, protocol=5).dump((model, batches, state))
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
        return None
    return hashlib.sha256(buffer.getvalue()).digest()


def keep(key: bytes | None, submodule: CapturedModule) -> None:
    """Remember what ``module``, that of a whole model, has captured."""
    if key is not None and submodule.graphs and not submodule.opened:
        _KEPT[key] = _copied(submodule.graphs)
        if len(_KEPT) > _MOST:
            _KEPT.popitem(last=False)


def restore(key: bytes | None, submodule: CapturedModule) -> bool:
    """Give ``module`` graphs that were captured of an equal model; whether there were any."""
    if key is None or key not in _KEPT:
        return False
    _KEPT.move_to_end(key)
    submodule.graphs = _copied(_KEPT[key])
    for _, graph in submodule.graphs:
        rebind(graph.gm, submodule.module)
    return True


def _copied(graphs: _Graphs) -> _Graphs:
    return [
        (signature, dataclasses.replace(graph, gm=copy.deepcopy(graph.gm)))
        for signature, graph in graphs
    ]
