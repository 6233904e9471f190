"""From the captured graph to the canonical one: every product in one form, names on every tensor.

The captured graph is kept as it is, since it alone gives the float model's output bit for bit; each
node of the canonical graph remembers which captured node computes the same tensor.
"""

from __future__ import annotations

from torch import fx

from torch_quant.graph.sites import ORIGIN, name_tensors
from torch_quant.passes.base import Pass, PassContext, copy_graph, run_passes
from torch_quant.passes.expert_forms import normalize_experts
from torch_quant.passes.fold_batch_norm import fold_batch_norm
from torch_quant.passes.fold_pads import fold_pads
from torch_quant.passes.functionalize import functionalize
from torch_quant.passes.identity import remove_identities, views_to_reshapes
from torch_quant.passes.linear_forms import normalize_linear

__all__ = ["CANONICAL_PASSES", "canonicalize"]

CANONICAL_PASSES: tuple[Pass, ...] = (
    remove_identities,
    functionalize,
    views_to_reshapes,
    normalize_linear,
    normalize_experts,
    fold_pads,
    fold_batch_norm,
)


def canonicalize(captured: fx.GraphModule, path: str = "") -> fx.GraphModule:
    """A canonical copy of ``captured``, over the same parameters.

    Args:
        captured: the graph of one module.
        path: the module's path in the model, the prefix of every name.
    """
    gm = copy_graph(captured)
    for old, new in zip(captured.graph.nodes, gm.graph.nodes, strict=True):
        new.meta[ORIGIN] = old.name
    run_passes(PassContext(gm), CANONICAL_PASSES)
    name_tensors(gm.graph, path)
    return gm
