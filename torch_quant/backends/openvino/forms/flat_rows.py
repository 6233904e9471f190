"""Rows of images are rows of sequences.

layer_norm, linear, gelu, linear of [N, H, W, C]     reshape to [N, H W, C], the same, reshape back
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torch_quant.backends.onnx.forms.matching import ELEMENTWISE, free_ranks, is_target
from torch_quant.ops.arguments import argument
from torch_quant.ops.qdq import DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR
from torch_quant.ops.table import size_hints
from torch_quant.passes.base import PassContext, call_again

__all__ = ["flat_rows"]

aten = torch.ops.aten

_BY_ROWS = frozenset({aten.linear.default, aten.layer_norm.default})
"""What works on the last dimension alone."""
_BY_ELEMENTS = ELEMENTWISE | {QUANTIZE_PER_TENSOR, DEQUANTIZE_PER_TENSOR}
_MOST = 3
"""Dimensions for which OpenVINO has kernels that do what follows as well; of more it has others."""


def flat_rows(context: PassContext) -> int:
    """Layer norms and linear layers of four and more dimensions, and what follows, have three."""
    flat, unknown = _Flat(), free_ranks(context.graph)
    for node in list(context.graph.nodes):
        if node in unknown:
            continue  # where it has fewer dimensions, its sizes are others
        if node.target in _BY_ROWS and _has_known_width(argument(node, 0)):
            flat.rows(node)
        elif node.target in _BY_ELEMENTS and argument(node, 0) in flat.of:
            flat.replace(node, flat.of[argument(node, 0)])
    return flat.changed


def _has_known_width(x: fx.Node) -> bool:
    """Whether a tensor has more dimensions than wanted, the last one of a size that stays."""
    sizes = x.meta["val"].shape
    return len(sizes) > _MOST and isinstance(sizes[-1], int)


@dataclass(frozen=True)
class _Rows:
    """A tensor in three dimensions, and what all but the last have been before."""

    node: fx.Node
    sizes: list[fx.Node]
    width: int


class _Flat:
    """Tensors of three dimensions in the place of those of more."""

    def __init__(self) -> None:
        self.of: dict[fx.Node, _Rows] = {}
        """A tensor -> its rows."""
        self.changed = 0

    def rows(self, node: fx.Node) -> None:
        """Let a function of rows read three dimensions, if it can."""
        if node.target is aten.layer_norm.default and len(argument(node, "normalized_shape")) > 1:
            return
        x = argument(node, 0)
        if x not in self.of and is_target(x, DEQUANTIZE_PER_TENSOR):
            codes = argument(x, "q")
            if not is_target(codes, QUANTIZE_PER_TENSOR):
                return  # they moved, and OpenVINO wants the two side by side
            for each in (codes, x):
                self.put(each, self.flattened(argument(each, 0)), each)
        self.replace(node, self.flattened(x), size_hints(node)[-1])

    def flattened(self, x: fx.Node) -> _Rows:
        if x not in self.of:
            graph, (*leading, width) = x.graph, size_hints(x)
            with graph.inserting_before(x.next):
                sizes = [
                    graph.call_function(aten.sym_size.int, (x, i)) for i in range(len(leading))
                ]
                flat = graph.call_function(aten.flatten.using_ints, (x, 1, -2))
            self.of[x] = _Rows(flat, sizes, width)
        return self.of[x]

    def put(self, node: fx.Node, rows: _Rows, before: fx.Node, width: int = 0) -> _Rows:
        """Compute what ``node`` does of ``rows`` too."""
        new = call_again(node, {0: rows.node}, before)
        self.of[node] = _Rows(new, rows.sizes, width or rows.width)
        return self.of[node]

    def replace(self, node: fx.Node, rows: _Rows, width: int = 0) -> None:
        """Compute ``node`` of ``rows`` instead of its first argument."""
        found = self.put(node, rows, node, width)
        with node.graph.inserting_before(node):
            shape: Any = [*found.sizes, found.width]
            shaped = node.graph.call_function(aten.reshape.default, (found.node, shape))
        shaped.meta = dict(node.meta)
        node.replace_all_uses_with(shaped)
        node.graph.erase_node(node)
        self.of[shaped] = self.of.pop(node)
        self.changed += 1
