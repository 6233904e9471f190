"""Which graphs of a quantized model an example takes: what a file of it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_quant.convert.quantized import QuantizedModule, quantized_graphs
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.graph.binding import bind
from torch_quant.graph.calls import flatten_call
from torch_quant.graph.examples import example_call

__all__ = ["graphs_called"]


def graphs_called(
    model: QuantizedModule, example_inputs: Any
) -> list[tuple[str, QuantizedGraph, tuple[Tensor, ...]]]:
    """(name, graph, tensors) of each graph that the example takes, in order, once each."""
    args, kwargs = example_call(example_inputs)
    how = model.quantization
    if how.glue is None:
        call = flatten_call(*bind(how.signature, args, kwargs))
        for graph in how.graphs:
            accepted = graph.accept(call)
            if accepted is not None:
                return [("", graph, accepted.tensors)]
    names: dict[QuantizedGraph, str] = {}
    for submodule, graph in quantized_graphs(model):
        i = submodule.quantization.graphs.index(graph)
        names[graph] = submodule.quantization.path + (f".{i}" if i else "")
    found: dict[QuantizedGraph, tuple[Tensor, ...]] = {}

    def note(graph: Any, tensors: tuple[Tensor, ...]) -> None:
        found.setdefault(graph, tensors)

    hooks = [graph.register_forward_pre_hook(note) for graph in names]
    try:
        with torch.no_grad():
            model(*args, **kwargs)  # raises, saying why, where no graph serves the example
    finally:
        for hook in hooks:
            hook.remove()
    return [(names[graph], graph, tensors) for graph, tensors in found.items()]
