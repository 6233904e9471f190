"""A quantized model whose outputs are mostly noise says so, with the sites and the cure."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from torch_quant.amp.fallback import Fallback
from torch_quant.amp.options import AmpOptions
from torch_quant.amp.proxy import AmpModel
from torch_quant.backends import Backend
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import QuantError
from torch_quant.proxies.sample import Sample, collapse
from torch_quant.proxies.values import copied
from torch_quant.session import Session

__all__ = ["tell_collapse"]

logger = logging.getLogger("torch_quant")

_SHOWN = 3
_CURE = (
    "Take them back to float: amp_model = quantizer.amp(model), run data through it, "
    "quantizer.fallback(amp_model, min_sqnr=20); quantizer.optimize(amp_model) and "
    "torch_quant.tune may do with fewer"
)


def tell_collapse(
    session: Session, plan: QuantPlan, backend: Backend, quant_model: Callable[..., Any]
) -> None:
    """Log a warning if the outputs for the last calibration batch are below 10 dB.

    The quantized model is called once for that, where no compiler would have to run. An AMP proxy
    finds the sites, if it comes to that.

    Args:
        session: of the float model.
        plan: what was quantized.
        backend: where it runs.
        quant_model: what was made.
    """
    sample = session.captured.sample
    if sample is None or backend.compiles or not plan.quantized or session.captured.keeps_state:
        return
    found = collapse(sample, session.model, quant_model)
    if found is None:
        return
    logger.warning(
        "the outputs of the quantized model have %.1f dB of SQNR on the last calibration batch%s. "
        "%s",
        found,
        _where(session, sample, plan),
        _CURE,
    )


def _where(session: Session, sample: Sample, plan: QuantPlan) -> str:
    """The sites that most of the noise comes from, as a part of the sentence."""
    amp_model = AmpModel(session, AmpOptions())
    args, kwargs = copied((sample.args, sample.kwargs))
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            amp_model(*args, **kwargs)
        ranking = Fallback(amp_model).ranking
    except QuantError as error:
        logger.debug("no sites to name: %s", error)
        return ""
    names = [site.name for site in ranking if plan[site.name].quantized][:_SHOWN]
    return f", most of the noise from {', '.join(names)}" if names else ""
