"""Gathers what is known of a model and its quantization into one report."""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch

from torch_quant.amp.ranking import Ranking
from torch_quant.backends import Backend
from torch_quant.comparing import compared, simulated_model
from torch_quant.convert.quantized import QuantizedModule, plan_of
from torch_quant.core.memory import tensor_bytes
from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.errors import InvalidConfig
from torch_quant.report.comparison import Comparison
from torch_quant.report.coverage import Coverage
from torch_quant.report.names import printable
from torch_quant.report.speed import Profile
from torch_quant.report.whole import FORMAT, ModelReport
from torch_quant.reporting.distributions import Values, activation, grids_of, weights
from torch_quant.session import Session
from torch_quant.version import __version__

__all__ = ["Extras", "checked_metrics", "gathered"]


@dataclass(frozen=True)
class Extras:
    """What a report has beside the model's own facts.

    Args:
        batches: inputs on which the error is followed and values are counted.
        ranking: what each site does to the outputs.
        profile: how fast it is.
        metrics: name -> float and quantized.
        title: the headline.
        settings: the configuration as data, or why there is none.
        progress: goes through the batches.
    """

    batches: Sequence[Any] = ()
    ranking: Ranking | None = None
    profile: Profile | None = None
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    title: str = ""
    settings: Mapping[str, Any] | str = ""
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter


def checked_metrics(metrics: Any) -> dict[str, tuple[float, float]]:
    """Metrics as name -> (float, quantized); raises :class:`InvalidConfig` for something else.

    >>> checked_metrics({"accuracy": (0.91, 0.9)})
    {'accuracy': (0.91, 0.9)}
    >>> checked_metrics({"perplexity": (torch.tensor(8.5), float("inf"))})
    {'perplexity': (8.5, inf)}
    """
    if metrics is None:
        return {}
    found = {}
    for name, pair in metrics.items() if isinstance(metrics, Mapping) else [("", metrics)]:
        given = pair if isinstance(pair, Sequence) and not isinstance(pair, str) else ()
        numbers = [x for x in map(_number, given) if x is not None]
        if not (isinstance(name, str) and name and len(given) == len(numbers) == 2):
            raise InvalidConfig(
                f"metrics={metrics!r}: expected name -> (float model, quantized model), as "
                'metrics={"accuracy": (0.912, 0.908)}'
            )
        found[name] = (numbers[0], numbers[1])
    return found


def _number(value: Any) -> float | None:
    """Of Python, NumPy, or a tensor without dimensions; None if it is no real number."""
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return None


def gathered(
    session: Session, backend: Backend, quantized: QuantizedModule, extras: Extras
) -> ModelReport:
    """The report of a model.

    Args:
        session: the quantizer and the model, which was captured.
        backend: whose plan it is.
        quantized: the model on its kernels.
        extras: what else is in it.
    """
    plan = plan_of(quantized)
    simulated = simulated_model(session, backend)
    grids = grids_of(simulated, plan)
    values, comparison = None, None
    if extras.batches:
        values = Values(grids)
        comparison = compared(
            session,
            backend,
            quantized,
            extras.batches,
            extras.progress,
            simulated=simulated,
            watch=values.watch,
        )
    kept, why_not = weights(simulated, plan)
    inputs = {
        site: [activation(grid, session.state, values) for grid in found]
        for site, found in grids.items()
    }
    coverage = Coverage.of(session.captured, plan, repr(backend))
    model = session.model
    data: dict[str, Any] = {
        "format": FORMAT,
        "title": printable(extras.title) or f"{type(model).__name__}, quantized",
        "model": type(model).__qualname__,
        "backend": backend.name,
        "made": _made(),
        "summary": coverage.plan.summary,
        "coverage": coverage.share,
        "by_op": coverage.by_op(),
        "bytes": {"float": tensor_bytes(model), "quantized": tensor_bytes(quantized)},
        "calibration": session.state.describe(),
        "layers": _layers(session, plan, inputs, kept, comparison, extras.ranking),
        "outside": [{"module": name, "why": why} for name, why in coverage.glue],
        "comparison": _compared(comparison),
        "sensitivity": _sensitivity(extras.ranking),
        "speed": _speed(extras.profile, backend),
        "metrics": [
            {"name": name, "float": before, "quantized": after}
            for name, (before, after) in extras.metrics.items()
        ],
        "notes": [f"weights are not shown: {why_not}"] if why_not else [],
        "settings": extras.settings,
    }
    return ModelReport(_plain(data))


def _made() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "torch_quant": __version__,
        "torch": str(torch.__version__),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def _layers(
    session: Session,
    plan: QuantPlan,
    inputs: Mapping[str, list[dict[str, Any]]],
    kept: Mapping[str, Any],
    comparison: Comparison | None,
    ranking: Ranking | None,
) -> list[dict[str, Any]]:
    """An entry for each site in the order they run, and for each operator that is no site."""
    owner = session.owner
    slower = {name for names in owner.slower.values() for name in names}
    errors = {each.site: each for each in comparison or ()}
    scores = {each.name: each for each in ranking or ()}
    total, noise = plan.macs or 1, sum(each.score for each in ranking or ()) or 1.0
    found: list[dict[str, Any]] = []
    for name, site in plan.items():
        error, score = errors.get(name), scores.get(name)
        found.append(
            {
                "name": name,
                "op": site.op,
                "quantized": site.quantized,
                "format": site.format if site.quantized else site.precision,
                "reason": site.reason,
                "why": _kind(site, name in owner.fallen_back, name in slower),
                "macs": site.macs,
                "share": site.macs / total,
                "inputs": inputs.get(name, []) if site.quantized else [],
                "activation": _spec(site.activation) if site.quantized else None,
                "weight": kept.get(name),
                "method": None if site.method is None else str(site.method),
                "transforms": [str(each) for each in site.transforms],
                "error": None
                if error is None
                else {"before": error.before, "after": error.after, "adds": error.share},
                "sensitivity": None
                if score is None
                else {
                    "share": score.score / noise,
                    "local": score.local_sqnr,
                    "output": score.predicted_output_sqnr,
                    "by_weight": score.weight_share,
                    "together": list(score.together),
                },
            }
        )
    nothing = ("activation", "weight", "method", "error", "sensitivity")
    empty: dict[str, Any] = {"inputs": [], "transforms": [], **dict.fromkeys(nothing)}
    found += [
        {"name": op.name, "op": op.op, "quantized": False, "format": "float32", "why": "no site",
         "reason": op.reason, "macs": op.macs, "share": op.macs / total, **empty}
        for op in plan.float_ops
    ]  # fmt: skip
    return found


def _spec(spec: Any) -> str | None:
    return None if spec is None else str(spec)


def _kind(site: SitePlan, fell_back: bool, slower: bool) -> str:
    """Why a site is in float, in a word that the page sorts by."""
    if site.quantized:
        return ""
    if fell_back:
        return "fallen back"
    return "slower" if slower else "float"


def _compared(found: Comparison | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "outputs": found.outputs,
        "simulated": found.simulated,
        "batches": found.batches,
        "unseen": found.unseen,
        "equal": found.outputs == math.inf,
    }


def _sensitivity(ranking: Ranking | None) -> dict[str, Any] | None:
    if ranking is None:
        return None
    data = ranking.to_dict()
    measured: Mapping[int, float] = getattr(ranking, "measured", {})
    return {
        "metric": ranking.metric,
        "meaning": data["meaning"],
        "batches": ranking.batches,
        "note": ranking.note,
        "curve": [[count, sqnr, measured.get(count)] for count, sqnr in ranking.curve()]
        if ranking.metric == "output"
        else [],
    }


def _speed(profile: Profile | None, backend: Backend) -> dict[str, Any] | None:
    if profile is None:
        return None
    return {
        "runs": [
            {"name": each.name, "quantized": each.backend is not None, "median": each.median,
             "p90": each.p90, "sqnr": each.sqnr, "why_not": each.why_not,
             "this": each.backend == backend.name}
            for each in profile
        ],
        "threads": profile.threads,
        "rounds": profile.rounds,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """A value as JSON has it: numbers that are not finite are words, ``"inf"``, ``"nan"``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
