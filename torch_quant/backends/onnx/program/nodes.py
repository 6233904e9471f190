"""What rewrites of an ONNX program ask of its nodes."""

from __future__ import annotations

from typing import Any

__all__ = ["constant", "producer"]


def producer(value: Any, op_type: str) -> Any | None:
    """The node that makes ``value``, if it is an ONNX operator of that type."""
    node = None if value is None else value.producer()
    return node if node is not None and (node.domain, node.op_type) == ("", op_type) else None


def constant(graph: Any, tape: Any, name: str, value: Any) -> Any:
    """A new constant of the graph, made with ``tape``; another name where there is one."""
    import onnx_ir as ir

    while name in graph.initializers:
        name += "_"
    made = tape.initializer(ir.tensor(value), name)
    graph.register_initializer(made)
    return made
