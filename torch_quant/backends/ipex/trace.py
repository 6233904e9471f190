"""Trace, freeze and warm up: only then does IPEX fuse a graph."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["WRITES", "FusedGraph", "import_ipex", "record", "writes_in_place"]

_RUNS = 2
"""The first run records shapes and types, the second builds the kernels."""


def import_ipex() -> Any:
    """IPEX, without what it says about itself when it is loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("intel_extension_for_pytorch")


WRITES = "it writes to a tensor through a view, which IPEX leaves out"
"""Why a graph is not traced."""


def writes_in_place(body: fx.GraphModule) -> bool:
    """Whether an operator of ``body`` writes to its argument; IPEX drops some such operators."""
    schemas = [getattr(node.target, "_schema", None) for node in body.graph.nodes]
    return any(schema is not None and schema.is_mutable for schema in schemas)


def record(body: Callable[..., Any], tensors: tuple[Tensor, ...], *, bfloat16: bool) -> Any:
    """Run ``body``; with ``bfloat16``, everything but its outputs in that type where it serves."""
    if not bfloat16:
        return body(*tensors)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        outputs = body(*tensors)
    return tuple(_full(x) for x in outputs)


def _full(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x


class _Recorded(nn.Module):
    """What is traced. Tracing returns tensors: numbers among the outputs become some."""

    def __init__(self, body: Callable[..., Any], bfloat16: bool) -> None:
        super().__init__()
        self.body, self.mixed = body, bfloat16

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = record(self.body, tensors, bfloat16=self.mixed)
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
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit's deprecation, and the tracer's
            self.kinds = [type(x) for x in body(*tensors)]
            traced = torch.jit.trace(_Recorded(body, bfloat16).eval(), tensors, check_trace=False)
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
