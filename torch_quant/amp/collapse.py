"""A quantized model whose outputs are mostly noise says so, with the sites and the cure."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.amp.fallback import Fallback
from torch_quant.amp.noise import NoisePass
from torch_quant.amp.options import AmpOptions
from torch_quant.amp.proxy import AmpModel
from torch_quant.backends import Backend
from torch_quant.convert.quantized import QuantizedModule
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import QuantError
from torch_quant.proxies.sample import Sample, collapse
from torch_quant.session import Session

__all__ = ["tell_collapse"]

logger = logging.getLogger("torch_quant")

_SHOWN = 3
_ROWS = 16
"""Of the batch that are looked at."""
_FEW, _BYTES = 4, 2**20
"""Rows and bytes of what the sites are found by."""
_ACTIVATIONS = 128 * 2**20
"""Bytes that gradients may keep of it; the noise of the sites takes as much again."""
_CURE = (
    "Take them back to float: amp_model = quantizer.amp(model), run data through it, "
    "quantizer.fallback(amp_model, min_sqnr=20); quantizer.optimize(amp_model) and "
    "torch_quant.tune may do with fewer"
)


def tell_collapse(
    session: Session, plan: QuantPlan, backend: Backend, quant_model: QuantizedModule
) -> None:
    """Log a warning if the outputs for the last calibration batch are below 10 dB.

    The graphs are run for that, where no compiler would have to; whatever they raise says nothing.

    Args:
        session: of the float model.
        plan: what was quantized.
        backend: where it runs.
        quant_model: what was made.
    """
    try:
        found, where = _looked_at(session, plan, backend, quant_model)
    except Exception as error:  # a call of the user's will tell
        logger.debug("the last calibration batch says nothing: %s", error)
        return
    if found is not None:
        logger.warning(
            "the outputs of the quantized model have %.1f dB of SQNR on the last calibration "
            "batch%s. %s",
            found,
            where,
            _CURE,
        )


def _looked_at(
    session: Session, plan: QuantPlan, backend: Backend, quant_model: QuantizedModule
) -> tuple[float | None, str]:
    """The SQNR where it is too low, else None; and the part of the sentence that names sites."""
    captured = session.captured
    sample, root = captured.sample, captured.root
    if sample is None or backend.compiles or not plan.quantized or captured.keeps_state:
        return None, ""
    if root.failure or root.plain or torch.is_autocast_enabled("cpu"):
        return None, ""
    graphs = zip(root.graphs, quant_model.quantization.graphs, strict=True)
    served = [made for (_, graph), made in graphs if graph is sample.graph]
    sample = sample.first(_ROWS)
    found = collapse(sample, served[0].body) if served else None
    if found is None:
        return None, ""
    try:
        names = _Sensitivity(session).names(sample)
    except Exception as error:  # no gradient, sizes that the graph does not take
        logger.debug("no sites to name: %s", error)
        return found, ""
    shown = [name for name in names if plan[name].quantized][:_SHOWN]
    return found, f", most of the noise from {', '.join(shown)}" if shown else ""


class _Sensitivity(AmpModel):
    """Looks at one batch of one graph, which it runs by itself."""

    def __init__(self, session: Session) -> None:
        super().__init__(session, AmpOptions())

    def names(self, sample: Sample) -> list[str]:
        """The sites of a model, what gives the most noise first; none where that takes memory."""
        cut = sample.first(_FEW)
        if cut.bytes > _BYTES:
            return []
        with torch.inference_mode(False), torch.no_grad():
            counted = _Counted(sample.graph.gm)
            counted.run(*cut.fresh())
        if counted.bytes > _ACTIVATIONS:
            return []
        gm = self._instrument(self.captured.root, sample.graph)
        with torch.inference_mode(False), self.recorder.batch() as record:
            pass_ = NoisePass(record, cut.rows, torch.zeros((), requires_grad=True))
            tensors = cut.fresh()
            with torch.enable_grad(), self._visiting(pass_.visit):
                outputs = type(gm).forward(gm, *tensors)
            self._backward(record, pass_, outputs, tensors, {})
        return [site.name for site in Fallback(self).ranking]

    def _give_up(self, reason: str) -> None:
        raise QuantError(f"no gradient: {reason}")


class _Counted(fx.Interpreter):
    """Runs a graph and counts what its results take, views included."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.bytes = 0

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        result = super().run_node(n)
        parts = result if isinstance(result, (list, tuple)) else (result,)
        if n.op == "call_function":
            self.bytes += sum(x.nbytes for x in parts if isinstance(x, Tensor))
        return result
