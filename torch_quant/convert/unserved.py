"""What a quantized module says of a call that it has no graph for."""

from __future__ import annotations

from collections.abc import Sequence

from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.errors import CaptureFailed
from torch_quant.graph.calls import Call
from torch_quant.graph.export import ModelRefuses

__all__ = ["unserved"]

_DO = "Run quantizer.calib(model) on such inputs too, then quantize again"


def unserved(
    where: str, graphs: Sequence[QuantizedGraph], call: Call, why: str, error: Exception | None
) -> CaptureFailed:
    """The error to raise.

    Args:
        where: the module.
        graphs: that it has.
        call: that none of them serves.
        why: it cannot be captured now, empty if nobody tried.
        error: what was raised when somebody tried, if anything was.
    """
    reason = f". {why}" if why else ""
    if not graphs:
        what = f"{where} was never called by itself while calibrating{reason}"
        return CaptureFailed(f"{what}. {_DO}")
    nearest = _nearest(graphs, call)
    found = (
        f"{where} was quantized for other inputs: got {', '.join(call.describe())}; "
        f"{nearest.mismatch(call)}"
    )
    if isinstance(error, ModelRefuses):  # no data of this kind can be had
        text = str(error)
        return CaptureFailed(
            f"{found}. {text[:1].upper()}{text[1:]}. Give inputs of the dtypes and sizes that it "
            f"was captured for: {nearest.contract.describe()}"
        )
    return CaptureFailed(f"{found}{reason}. {_DO}")


def _nearest(graphs: Sequence[QuantizedGraph], call: Call) -> QuantizedGraph:
    """The graph that comes nearest to serving a call."""
    inputs = set(call.paths())
    return min(
        graphs,
        key=lambda g: (call.distance(g.kind), len(inputs.symmetric_difference(g.kind.names))),
    )
