"""Optimizing the ONNX form of large graphs in time that grows with their size, not its square.

onnxscript's optimizer has rules for operators with several outputs, which try all nodes of the
graph for each node. Of a loop that is written out, they take minutes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

__all__ = ["LARGE", "tidied"]

LARGE = 500
"""Nodes of a graph for which :func:`tidied` stands in for onnxscript's optimizer."""
_ROUNDS = 2
"""Of folding and rewriting, as the optimizer makes."""


def tidied(program: Any) -> None:
    """What ``program.optimize()`` does, without rules that search the graph for each node.

    With an onnxscript that lacks a step of it, that itself.

    Args:
        program: an ``ONNXProgram`` that was not optimized, changed in place.
    """
    try:
        before, rounds, after = _steps()
    except (ImportError, AttributeError):  # an onnxscript that has other steps
        program.optimize()
        return
    for each in (*before, *rounds * _ROUNDS, *after):
        each(program.model)


def _steps() -> tuple[list[Any], list[Any], list[Any]]:
    """What is done first, in each round, and at last."""
    import onnx_ir.passes.common as common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter import onnx_fusions

    rules = [rule for rule in _rules(rewriter) if _one_output(rule)]
    rounds = [
        partial(optimizer.fold_constants, onnx_shape_inference=True),
        *([rewriter.RewritePass(rules)] if rules else []),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    ]
    after = [
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        onnx_fusions.fuse,
    ]
    return [common.InlinePass()], rounds, after


def _rules(rewriter: Any) -> list[Any]:
    found = getattr(rewriter, "_DEFAULT_REWRITE_RULES", ())
    return list(getattr(found, "rules", found))


def _one_output(rule: Any) -> bool:
    """Whether a rule looks at what leads to one node; one that is unknown here does not count."""
    pattern = getattr(getattr(rule, "_matcher", None), "pattern", None)
    return bool(getattr(pattern, "has_single_output_node", False))
