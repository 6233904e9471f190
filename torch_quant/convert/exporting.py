"""A lowered graph as a program of PyTorch's exporter, with the sizes free that it leaves free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.graph.export import size_oblivious
from torch_quant.passes.base import Pass, PassContext, copy_graph, run_passes

__all__ = ["OnlyTensors", "Tell", "exported_at_once", "exported_with_free_sizes", "input_shapes"]

Tell = Callable[[str], None]


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


def exported_with_free_sizes(
    graph: QuantizedGraph, tensors: tuple[Tensor, ...], tell: Tell, passes: Sequence[Pass] = ()
) -> Any:
    """The graph with free sizes, as far as the exporter can.

    A batch of 1 may have to be repeated for that.

    Args:
        graph: what is exported.
        tensors: an example of its inputs.
        tell: is told of sizes that are fixed though the graph leaves them free.
        passes: are run over a copy of the graph before.

    Returns:
        An ``ExportedProgram`` of :class:`OnlyTensors`.

    Raises:
        Exception: of many unrelated classes of PyTorch: it cannot be exported at all.
    """
    twice = tuple(torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x for x in tensors)
    reasons: list[Exception] = []
    for example, mode in ((tensors, "oblivious"), (twice, "oblivious"), (twice, "dynamic")):
        try:
            exported = exported_at_once(graph, example, mode, passes)
            _tell_fixed(exported, graph, tell)
            return exported
        except Exception as error:  # torch.export raises errors of many unrelated classes
            reasons.append(error)
    try:
        exported = exported_at_once(graph, tensors, "static", passes)
    except Exception as error:
        raise reasons[0] from error
    tell(f"sizes as in the example only: {reasons[0]}")
    return exported


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
    with size_oblivious(mode == "oblivious"):
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


def _tell_fixed(exported: Any, graph: QuantizedGraph, tell: Tell) -> None:
    """Tell of sizes that the exporter fixes though the quantized model leaves them free."""
    contract = graph.contract
    shapes = input_shapes(exported)
    for name, found, sizes in zip(contract.names, shapes, contract.shapes, strict=True):
        for axis, size in enumerate(sizes):
            free = isinstance(size, str) and isinstance(found[axis], int)
            if free and not contract.fixes(size, found[axis]):
                tell(
                    f"{name}.shape[{axis}] = {found[axis]} only: an operator is exported for the "
                    "example's size"
                )
