"""A new statistic of activations: one class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from contract import check_workflow
from models import MODELS, example
from torch import Tensor

from torch_quant import Granularity, QConfig, QuantSpec
from torch_quant.statistics import Observer, register_statistic


class ThreeSigma(Observer):
    """Three standard deviations around the mean, over all batches."""

    name = "three_sigma"

    def __init__(self, granularity: Granularity | None = None) -> None:
        super().__init__(granularity)
        self.sums = torch.zeros(3, dtype=torch.float64)

    def _record(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        wide = x.double()
        self.sums += torch.stack([torch.ones_like(wide).sum(), wide.sum(), wide.square().sum()])

    def _range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        count, total, squares = self.sums
        mean = total / count
        reach = 3.0 * (squares / count - mean.square()).clamp(min=0.0).sqrt()
        return (mean - reach).float(), (mean + reach).float()

    def _merge(self, other: ThreeSigma) -> None:
        self.sums += other.sums

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "sums": self.sums.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches = state["batches"]
        self.sums = state["sums"].clone()


def test_an_observer_is_one_class(tmp_path: Path) -> None:
    register_statistic(ThreeSigma)
    quantizer, _ = check_workflow(
        MODELS["small_cnn"](),
        (example("small_cnn", 16), {}),
        "head",
        tmp_path,
        least=10.0,
        backend="reference",
        qconfig=QConfig(observer="three_sigma"),
    )
    assert set(quantizer.state.describe()["observers"]) == {"three_sigma"}
