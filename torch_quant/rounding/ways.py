"""Whether the weights of a model are rounded in blocks of its modules, or in its graph."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch_quant.core.plan import QuantPlan
from torch_quant.core.rounded import RoundedWeights
from torch_quant.errors import InvalidConfig
from torch_quant.rounding.driver import round_weights
from torch_quant.rounding.graphs import learned_sites, round_graph
from torch_quant.rounding.report import Rounding
from torch_quant.session import Session

__all__ = ["rounded"]


def rounded(
    session: Session,
    plan: QuantPlan,
    batches: Sequence[Any],
    *,
    folder: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
) -> tuple[RoundedWeights, Rounding]:
    """The codes of weights that data are needed for, and a report.

    Args:
        session: the quantizer and the model.
        plan: of the model.
        batches: inputs, each as ``example_inputs`` of :meth:`Quantizer.calib`.
        folder: where finished blocks are kept; a graph has none.
        show_progress: show a bar on stderr.

    Raises:
        InvalidConfig: as :func:`round_weights` and :func:`round_graph` say; or a graph's weights
            are to be kept in a folder.
    """
    if learned := learned_sites(session, plan):
        if folder is not None:
            raise InvalidConfig(
                f"round_weights: folder={str(folder)!r} keeps finished blocks of modules; these "
                "weights are rounded in the model's graph, anew each time: leave it out, and keep "
                "the result with quantizer.save(...)"
            )
        return round_graph(session, plan, learned, batches, show_progress=show_progress)
    sites, plain = [site for site, _ in session.captured.sites()], session.captured.plain_weights()
    return round_weights(
        session.model, sites, plan, plain, batches, folder=folder, show_progress=show_progress
    )
