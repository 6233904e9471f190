"""A lowered graph as a program of PyTorch's exporter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.graph.export import size_oblivious
from torch_quant.graph.forgetting import forgotten
from torch_quant.passes.base import Pass, PassContext, copy_graph, run_passes

__all__ = ["OnlyTensors", "exported_at_once", "input_shapes"]


class OnlyTensors(nn.Module):
    """A graph whose outputs that are no tensors are left out, and repeated ones are their own.

    Args:
        body: the graph, which stays as it is.
        passes: are run over the copy of it that is computed.
    """

    def __init__(self, body: fx.GraphModule, passes: Sequence[Pass] = ()) -> None:
        super().__init__()
        self.body = copy_graph(body)
        run_passes(PassContext(self.body), passes)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        seen: set[int] = {id(x) for x in tensors}
        outputs = []
        for x in self.body(*tensors):
            if isinstance(x, Tensor):
                outputs.append(x.clone() if id(x) in seen else x)
                seen.add(id(x))
        return tuple(outputs)


def exported_at_once(
    graph: QuantizedGraph, tensors: tuple[Tensor, ...], mode: str, passes: Sequence[Pass] = ()
) -> Any:
    """One export.

    Args:
        graph: what is exported.
        tensors: an example of its inputs.
        mode: ``static``: sizes as in the example; ``dynamic``: those free that the graph leaves
            free; ``oblivious``: likewise, and no code asks whether one is 0 or 1.
        passes: are run over a copy of the graph before.
    """
    from torch.export import Dim

    shapes = tuple(
        {
            i: Dim.AUTO
            for i, size in enumerate(sizes)
            if isinstance(size, str) and not graph.contract.fixes(size, x.shape[i])
        }
        or None
        for x, sizes in zip(tensors, graph.contract.shapes, strict=True)
    )
    with size_oblivious(mode == "oblivious"), forgotten():
        return torch.export.export(
            OnlyTensors(graph.body, passes),
            tuple(x.clone() for x in tensors),
            dynamic_shapes=None if mode == "static" else {"tensors": shapes},
            strict=False,
        )


def input_shapes(exported: Any) -> list[tuple[Any, ...]]:
    """For each input of a program: its sizes, where a number is one that is fixed."""
    values = {node.name: node.meta["val"] for node in exported.graph.find_nodes(op="placeholder")}
    return [tuple(values[name].shape) for name in exported.graph_signature.user_inputs]
