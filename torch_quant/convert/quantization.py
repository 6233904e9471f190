"""How one module of a quantized model runs, as data."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from torch_quant.convert.formats import Formats
from torch_quant.convert.joint import Begun, Member
from torch_quant.convert.ownership import SharedWeights
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.convert.remembered import Remembered
from torch_quant.core.plan import QuantPlan
from torch_quant.graph.calls import Call
from torch_quant.graph.kinds import Kind

__all__ = ["Quantization", "Unseen"]


class Unseen(Protocol):
    """Makes graphs for calls that a quantized module has none for."""

    def graph(
        self, path: str, call: Call, served: Sequence[Kind]
    ) -> tuple[QuantizedGraph, nn.Module]:
        """The graph and the float module; raises :class:`CaptureFailed`, saying why."""


@dataclass
class Quantization:
    """How one module of a quantized model runs.

    Args:
        path: its path in the model.
        signature: the float module's signature.
        backend: the name of the backend.
        graphs: its lowered graphs.
        glue: its own Python code over quantized children, where that is to run.
        in_pieces: whether that serves every call that no graph does.
    """

    path: str
    signature: inspect.Signature
    backend: str
    graphs: list[QuantizedGraph] = field(default_factory=list)
    glue: nn.Module | None = None
    in_pieces: bool = False
    description: str = ""
    shared: SharedWeights | None = None
    unseen: Unseen | None = None
    plan: QuantPlan = field(default_factory=QuantPlan)
    calibration: dict[str, Any] = field(default_factory=dict)
    state: tuple[str, ...] = ()
    """Attributes that its Python code keeps from one call to the next."""
    looked_at: dict[str, tuple[torch.dtype, tuple[int, ...], bool]] = field(default_factory=dict)
    """Parameters of which code around it asks for dtype, sizes or whether they are trained, and no
    float copy is kept."""
    formats: Formats | None = None
    """Of the whole model; None while it is made."""
    traceable: bool = True
    """Whether ``torch.compile`` can follow the Python code: nothing in it has a fast path."""
    begun: Begun | None = None
    """Set when the Python code has run."""
    joint: Member | None = None
    """Its part among layers that one call computes."""
    remembered: Remembered = field(default_factory=Remembered, repr=False, compare=False)
    """Which graphs served earlier calls."""
