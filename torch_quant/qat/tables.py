"""Embedding tables, of which a call reads a few rows: these alone are rounded.

To round all of a table takes as long as to round every other weight of a small transformer. A row
that has scales of its own rounds the same by itself.
"""

from __future__ import annotations

import torch
from torch import fx

from torch_quant.ops.arguments import arguments
from torch_quant.qat.fake_quantize import ROWS, TRAINED_FAKE_QUANTIZE

__all__ = ["round_read_rows", "unrounded"]

_EMBEDDING = torch.ops.aten.embedding.default


def round_read_rows(graph: fx.Graph, tables: frozenset[fx.Node]) -> int:
    """Have embeddings round what they read, in the place of their table; returns how many do.

    Args:
        graph: where tables are rounded.
        tables: the roundings that have one scale or more for each row.
    """
    changed = 0
    for node in graph.find_nodes(op="call_function", target=_EMBEDDING):
        table, rows, padding, by_frequency, sparse = arguments(node).values()
        if table not in tables or by_frequency or sparse:
            continue
        with graph.inserting_before(node):
            new = graph.call_function(TRAINED_FAKE_QUANTIZE, (*table.args, rows, padding))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        if not table.users:
            graph.erase_node(table)
        changed += 1
    return changed


def unrounded(node: fx.Node) -> fx.Node:
    """What a rounding gives if it does not round: its input, or the rows of it that are read."""
    table, rows = node.args[0], node.args[ROWS : ROWS + 2]
    assert isinstance(table, fx.Node)
    if not rows:
        return table
    with node.graph.inserting_before(node):
        read = node.graph.call_function(_EMBEDDING, (table, *rows))
    read.meta = dict(node.meta)
    return read
