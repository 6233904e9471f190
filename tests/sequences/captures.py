"""Each module is exported once for each call, however often a sequence begins anew.

Exporting is nine tenths of what a sequence costs, and depends on the module and the call alone.
Captured modules, their graphs and which of them serves a call are still worked out each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn

from torch_quant.errors import CaptureFailed
from torch_quant.graph import capture
from torch_quant.graph.calls import Call

__all__ = ["shared_captures"]

_made: dict[Any, Any] = {}


@contextmanager
def shared_captures() -> Iterator[None]:
    """Have captured modules take what was exported before, of models that stay alive."""
    export = capture.export_call

    def shared(module: nn.Module, call: Call, known: Any = (), **options: Any) -> Any:
        values = (*module.parameters(), *module.buffers())
        shapes = tuple(x.shape for x in call.tensors)
        earlier = tuple(id(graph) for _, graph in known)
        free = options["free"](call)  # what the user's dynamic= leaves free
        key = (repr(module), tuple(map(id, values)), call.signature, shapes, earlier, str(free))
        if key not in _made:
            try:
                _made[key] = export(module, call, known, **options)
            except CaptureFailed as error:
                _made[key] = error
        if isinstance(_made[key], CaptureFailed):
            raise _made[key]
        first, graph = _made[key]
        return call.widened(sorted(first.numbers), sorted(first.unread)), graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "export_call", shared)
        yield
