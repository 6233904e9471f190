"""What weights are learned by in a model's graph: rows, whole batches, and what is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_quant import (
    AWQ,
    AdaRound,
    AutoRound,
    InvalidConfig,
    QConfig,
    QuantError,
    Quantizer,
    QuantSpec,
    sqnr,
)
from torch_quant.rounding.rows import independent_rows

INT4 = QuantSpec.of("int4", per_channel=True)
METHOD = AdaRound(60, batch_size=8)


def calibrated(model: nn.Module, config: QConfig, batches: list[Any], **given: Any) -> Quantizer:
    quantizer = Quantizer("reference", qconfig=config, **given)
    calib_model = quantizer.calib(model)
    for batch in batches:
        calib_model(*batch) if isinstance(batch, tuple) else calib_model(batch)
    return quantizer


def gains(model: nn.Module, batches: list[Any]) -> list[float]:
    """By how many dB each output is nearer to float than rounded to nearest."""
    learned = calibrated(model, QConfig(weight=INT4, method=METHOD), batches)
    learned.round_weights(model, batches, progress=False)
    nearest = calibrated(model, QConfig(weight=INT4), batches)
    exact, found, plain = (
        each(batches[0]) for each in (model, learned.quantize(model), nearest.quantize(model))
    )
    exact, found, plain = ((x,) if isinstance(x, Tensor) else x for x in (exact, found, plain))
    return [sqnr(x, y) - sqnr(x, z) for x, y, z in zip(exact, found, plain, strict=True)]


class Compares(nn.Module):
    """Takes the mean of the batch off, so a row by itself gives something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.head(y - y.mean(0, keepdim=True))


class LengthFirst(nn.Module):
    """Its rows are the places of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        seen = torch.softmax(torch.einsum("lne,mne->nlm", y, y) / 8, -1)
        return self.head(torch.einsum("nlm,mne->lne", seen, y))


@pytest.mark.parametrize("kind", [Compares, LengthFirst])
def test_rows_that_read_each_other_stay_together(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, sizes = kind().eval(), (10, 16) if kind is Compares else (4, 6, 16)
    (gain,) = gains(model, [torch.randn(sizes) + 1 for _ in range(3)])
    assert gain > 1


def test_independent_rows() -> None:
    x = torch.randn(5, 3, 4)
    assert independent_rows(nn.Linear(4, 2), (x,))
    assert independent_rows(nn.Linear(4, 2), (x[:1],))
    assert not independent_rows(nn.Flatten(0, 1), (x,))
    assert not independent_rows(nn.Flatten(0, -1), (x[:1],))


class Several(nn.Module):
    """Results of other sizes, of which the first is one number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.first(x))
        return self.a(y).square().mean(), self.b(y)


@pytest.mark.parametrize("rows", [1, 12])
def test_all_results_count(rows: int, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Several().eval()
    with caplog.at_level(logging.WARNING):
        _, gain = gains(model, [torch.randn(rows, 16) for _ in range(3)])
    assert gain > 2
    assert "reached" not in caplog.text


class Indexes(nn.Module):
    """Passes indices on, through which no gradient comes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, 16)
        self.table, self.head = nn.Embedding(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        index = self.second(torch.relu(self.first(x))).argmax(-1)
        return self.head(torch.relu(self.table(index)))


def test_behind_an_index(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = Indexes().eval(), torch.randn(32, 16)
    quantizer = calibrated(
        model, QConfig(weight=INT4, method=METHOD), [x], overrides={"table": None}
    )
    with caplog.at_level(logging.WARNING):
        report = quantizer.round_weights(model, [x], progress=False)
    assert set(report.sites) == {"first", "second", "head"}
    assert "or no gradient comes back to it" in caplog.text
    assert "all errors count alike" not in caplog.text
    assert quantizer.quantize(model)(x).shape == (32, 4)


class Selects(nn.Module):
    """Gives as many rows as are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.head(y[y[:, 0] > 0])


@pytest.mark.parametrize("method", [METHOD, AutoRound(20)], ids=str)
def test_sizes_that_depend_on_values(method: Any) -> None:
    torch.manual_seed(0)
    model, x = Selects().eval(), torch.randn(2048, 16)
    quantizer = calibrated(model, QConfig(weight=INT4, method=method), [x])
    with pytest.raises(QuantError, match=r"as its sizes depend on values.*take GPTQ"):
        quantizer.round_weights(model, [x], progress=False)


@pytest.mark.parametrize("empty_or_nan", ["empty", "nan"])
def test_batches_that_teach_nothing(empty_or_nan: str) -> None:
    model, x = nn.Sequential(nn.Linear(16, 4)).eval(), torch.randn(8, 16)
    quantizer = calibrated(model, QConfig(weight=INT4, method=METHOD), [x])
    bad = x[:0] if empty_or_nan == "empty" else x.clone().fill_(float("nan"))
    expected = r"batch 1 is empty.*leave it out" if empty_or_nan == "empty" else "batch 1 holds NaN"
    with pytest.raises(QuantError, match=expected):
        quantizer.round_weights(model, [x, bad], progress=False)
    assert not quantizer.state.rounded


def test_a_transform_of_blocks_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).eval(), torch.randn(8, 16)
    for config, overrides in (
        (QConfig(weight=INT4, method=METHOD, transforms=(AWQ(),)), {}),
        (QConfig(weight=INT4, method=METHOD), {"0": QConfig(weight=INT4, transforms=(AWQ(),))}),
    ):
        quantizer = calibrated(model, config, [x], overrides=overrides)
        with pytest.raises(
            InvalidConfig, match=r"^0: awq.* scales blocks of modules, .*calibration records"
        ):
            quantizer.round_weights(model, [x], progress=False)


def test_other_weights_than_calibration_saw_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(nn.Linear(16, 4)).eval(), torch.randn(8, 16)
    quantizer = calibrated(model, QConfig(weight=INT4, method=METHOD), [x])
    nn.init.normal_(model[0].weight)
    with caplog.at_level(logging.WARNING):
        quantizer.round_weights(model, [x], progress=False)
    assert "the ranges were calibrated with other weights: 0.weight changed" in caplog.text
