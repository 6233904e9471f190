"""Trace, freeze and warm up: only then does IPEX fuse a graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FusedGraph", "import_ipex"]

_RUNS = 2
"""The first run records shapes and types, the second builds the kernels."""


def import_ipex() -> Any:
    """IPEX, without what it says about itself when it is loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import intel_extension_for_pytorch

    return intel_extension_for_pytorch


class _TensorsOnly(nn.Module):
    """Tracing returns tensors: numbers among the outputs become some."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = self.body(*tensors)
        return tuple(x if isinstance(x, Tensor) else torch.tensor(x) for x in outputs)


class FusedGraph:
    """A lowered graph on IPEX's kernels; called like the graph.

    Args:
        body: a graph that :class:`IPEXBackend` lowered.
        tensors: what to trace and warm it up with; other sizes are compiled when they come.
        bfloat16: run what stays in float in bfloat16.
    """

    def __init__(
        self, body: Callable[..., Any], tensors: tuple[Tensor, ...], *, bfloat16: bool = False
    ) -> None:
        import_ipex()
        self.kinds = [type(x) for x in body(*tensors)]
        mixed = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit's deprecation, and the tracer's
            with mixed if bfloat16 else contextlib.nullcontext():
                traced = torch.jit.trace(_TensorsOnly(body).eval(), tensors, check_trace=False)
                self.script: torch.jit.ScriptModule = torch.jit.freeze(traced.eval())
            for _ in range(_RUNS):
                self.script(*tensors)

    @torch.no_grad()
    def __call__(self, *tensors: Tensor) -> tuple[Any, ...]:
        outputs = self.script(*tensors)
        return tuple(
            x.item() if kind in (int, float) else x
            for x, kind in zip(outputs, self.kinds, strict=True)
        )
