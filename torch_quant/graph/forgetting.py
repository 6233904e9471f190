"""PyTorch forgets what it noted of a capture.

Methods of its symbolic sizes keep what they were called with, for all captures of a process and
without a limit, and with that every graph that was ever captured. The sizes of a capture also know
its inputs, whose C++ part knows the sizes: a circle that no collection of garbage finds.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from torch_quant.graph.running import CAPTURING

__all__ = ["forgotten"]


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """Let what is captured meanwhile, by this thread, be freed when nobody needs it any more.

    >>> with forgotten():
    ...     1 + 1
    2
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    made: list[weakref.ref[Any]] = []
    thread, plain = threading.get_ident(), ShapeEnv.__init__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if threading.get_ident() == thread:  # others may be compiling something of theirs
            made.append(weakref.ref(self))

    with CAPTURING:
        ShapeEnv.__init__ = noted  # type: ignore[method-assign]
        try:
            yield
        finally:
            ShapeEnv.__init__ = plain  # type: ignore[method-assign]
            for each in made:
                _cut(each())
            _forget()


def _cut(sizes: Any) -> None:
    """Take the inputs from a capture's sizes. Only conditions on inputs are made of them."""
    for name in ("tracked_fakes", "fake_tensor_cache"):
        held = getattr(sizes, name, None)
        if held is not None:
            held.clear()


def _forget() -> None:
    """Empty PyTorch's memory of symbolic sizes; what is asked again is found out anew."""
    from torch.fx.experimental import proxy_tensor, symbolic_shapes

    for owner in (symbolic_shapes.ShapeEnv, symbolic_shapes):
        for each in vars(owner).values():
            clear = getattr(each, "cache_clear", None)
            if callable(clear) and not isinstance(each, type):
                clear()
    # Of the latest capture; only what writes it reads it.
    getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()
