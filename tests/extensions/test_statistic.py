"""A new statistic, which a transform wants: one class; it observes, merges and saves itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contract import check_workflow
from models import MODELS, example
from torch import Tensor

from torch_quant import QConfig, Quantizer, Transform, register_transform
from torch_quant.core.methods import Wanted
from torch_quant.graph.sites import Site, find_sites
from torch_quant.passes.base import PassContext
from torch_quant.statistics import Statistic, register_statistic

SEEN: list[float] = []


class Energy(Statistic):
    """The sum of squares of all that passed, and how many numbers that were."""

    name = "energy"

    def __init__(self) -> None:
        super().__init__()
        self.total, self.count = 0.0, 0

    def observe(self, x: Tensor) -> None:
        self.total += float(x.double().square().sum())
        self.count += x.numel()
        self.batches += 1

    def _merge(self, other: Energy) -> None:
        self.total += other.total
        self.count += other.count

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "total": self.total, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches, self.total, self.count = (state[n] for n in ("batches", "total", "count"))


@dataclass(frozen=True)
class Watching(Transform):
    """Changes nothing; asks for the energy."""

    name = "watching"

    def statistics(self, site: Site) -> Wanted:
        return {site.inputs[0]: {"energy": Energy}}

    def apply(self, context: PassContext) -> int:
        found = 0
        for _, _, site in find_sites(context.graph):
            if self in context.plan[site.name].transforms:
                energy = context.statistic(site.inputs[0], "energy")
                assert isinstance(energy, Energy)
                SEEN.append(energy.total / energy.count)
                found += 1
        return found


def test_a_statistic_is_one_class(tmp_path: Path) -> None:
    register_statistic(Energy)
    register_transform(Watching)
    model, x = MODELS["mlp"](), example("mlp", 16)
    quantizer, _ = check_workflow(
        model,
        (x, {}),
        "2",
        tmp_path,
        summary_is_all=False,
        backend="reference",
        qconfig=QConfig(transforms=[Watching()]),
    )
    assert any("energy" in kept for kept in quantizer.state.statistics.values())


def test_it_merges_and_is_saved(tmp_path: Path) -> None:
    register_statistic(Energy)
    register_transform(Watching)
    config = QConfig(transforms=[Watching()])
    model, (x,) = MODELS["mlp"](), example("mlp", 16)
    merged = Quantizer("reference", qconfig=config)
    for part in x.split(4):
        other = Quantizer("reference", qconfig=config)
        other.calib(model)(part)
        merged.merge(other)
    merged.save(tmp_path)
    SEEN.clear()
    Quantizer.load(tmp_path).quantize(model, example_inputs=x)
    assert abs(SEEN[0] - float(x.double().square().mean())) < 1e-6
    assert torch.isfinite(torch.tensor(SEEN)).all()
