"""The last calibration batch, by which a quantized model is looked at once before it is handed out.

It is kept where it is small, of models that are one graph. Both graphs are run on it by themselves,
with the weights as they are: no module is called, and no hook. A graph that draws random numbers or
has operators of other libraries is not run, nor one that a compiler would have to see first.
"""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.core.metrics import sqnr
from torch_quant.graph.calls import Call
from torch_quant.graph.export import CapturedGraph
from torch_quant.ops.arguments import arguments
from torch_quant.ops.library import NAMESPACE
from torch_quant.proxies.values import projected

__all__ = ["LEAST_SQNR", "Sample", "collapse"]

logger = logging.getLogger("torch_quant")

LEAST_SQNR = 10.0
"""dB of the outputs below which a model is said to have collapsed."""
BUDGET = 16 * 2**20
"""Bytes of inputs and outputs at most."""


@dataclass(frozen=True)
class Sample:
    """A batch, as a graph takes it.

    Args:
        graph: of the whole model, which served it.
        call: copies of what it took.
    """

    graph: CapturedGraph
    call: Call

    @classmethod
    def of(cls, graph: CapturedGraph, call: Call) -> Sample | None:
        """A batch before it runs; None where it is too large."""
        if _bytes(call.tensors) > BUDGET:
            return None
        return cls(graph, call.with_tensors(tuple(x.detach().clone() for x in call.tensors)))

    def fits(self, outputs: Any) -> bool:
        """Whether it is small enough with the flat outputs of the graph."""
        return self.bytes + _bytes(outputs) <= BUDGET

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The inputs."""
        return self.call.tensors

    @property
    def rows(self) -> int:
        """The first size of its inputs, 1 where they have none."""
        return next((len(x) for x in self.tensors if x.dim()), 1)

    def first(self, rows: int) -> Sample:
        """So many of its first rows, or all of it where the graph takes no other number.

        On other devices than a CPU all of it too: an index that is out of range ends a process.
        """
        whole = self.rows
        if whole <= rows or any(x.device.type != "cpu" for x in self.tensors):
            return self
        cut = (x[:rows] if x.dim() and len(x) == whole else x for x in self.tensors)
        call = self.call.with_tensors(tuple(cut))
        return self if self.graph.contract.mismatch(call) else Sample(self.graph, call)

    @property
    def bytes(self) -> int:
        """Of its inputs."""
        return _bytes(self.tensors)

    def fresh(self) -> tuple[Tensor, ...]:
        """Its inputs, to be written to, and outside of inference mode."""
        return tuple(x.clone() for x in self.tensors)

    def of_graph(self, gm: fx.GraphModule) -> list[Tensor]:
        """The float tensors that a graph gives for it."""
        with torch.inference_mode(False), torch.no_grad():
            return projected(type(gm).forward(gm, *self.fresh()))


def _bytes(values: Any) -> int:
    tensors = (x for x in values if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in tensors)


def _is_plain(node: fx.Node) -> bool:
    """Whether a node computes the same each time and does nothing else."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(node.graph.owning_module)
        return isinstance(value, Tensor)
    if node.op != "call_function":
        return False
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") in ("_operator", "math", "torch", "builtins")
    if target.namespace not in ("aten", "prims", NAMESPACE):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return True
    given = arguments(node)  # dropout in eval mode draws nothing
    trains = [given[name] for name in ("train", "training", "dropout_p") if name in given]
    return bool(trains) and not any(trains)


def collapse(sample: Sample, quantized: fx.GraphModule) -> float | None:
    """The SQNR of the outputs in dB where it is below :data:`LEAST_SQNR`, else None.

    Args:
        sample: of the last calibration batch.
        quantized: what the backend made of its graph.
    """
    gm = sample.graph.gm
    if not all(map(_is_plain, gm.graph.nodes)):
        return None
    found = sqnr(sample.of_graph(gm), sample.of_graph(quantized))
    return found if found < LEAST_SQNR else None
