"""Trace, freeze and warm up: only then does IPEX fuse a graph."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.errors import BackendUnavailable

__all__ = [
    "INSTALL", "WRITES", "FusedGraph", "import_failure", "import_ipex", "record",
    "writes_in_place",
]  # fmt: skip

INSTALL = (
    "in an environment of its own, on x86 Linux: "
    "pip install torch==2.8.0 intel-extension-for-pytorch==2.8.0 'transformers<5.24'"
)
"""What to install where IPEX does not load. It imports transformers where that is installed."""

_RUNS = 2
"""The first run records shapes and types, the second builds the kernels."""


def import_ipex() -> Any:
    """IPEX, without what it says about itself when it is loaded.

    Raises:
        BackendUnavailable: its import fails, in whatever way; quotes that, says what to install.
    """
    module, error = _imported()
    if error is not None:
        raise BackendUnavailable(f"Backend.IPEX does not run here: {_told(error)}") from error
    return module


def import_failure() -> str | None:
    """Why IPEX did not load in this process, or None where it did or nobody has tried."""
    if not _imported.cache_info().currsize:
        return None
    _, error = _imported()
    return None if error is None else _told(error)


@functools.cache  # a second import would find half of it and fail in another way
def _imported() -> tuple[Any, BaseException | None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("intel_extension_for_pytorch"), None
    except (Exception, SystemExit) as error:  # it exits where it misses instructions of the CPU
        return None, error


def _told(error: BaseException) -> str:
    return (
        f"intel-extension-for-pytorch is installed, but its import fails with "
        f"{type(error).__name__}: {error}; {INSTALL}"
    )


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
