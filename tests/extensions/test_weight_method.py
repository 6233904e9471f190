"""A new way to round a weight: one frozen dataclass; it may ask for statistics of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import check_workflow
from models import MODELS, example
from torch import Tensor

from torch_quant import (
    InvalidConfig,
    QConfig,
    QuantError,
    Quantizer,
    QuantSpec,
    RoundToNearest,
    SmoothQuant,
    WeightMethod,
    register_weight_method,
)
from torch_quant.core.functional import dequantize
from torch_quant.core.methods import Wanted
from torch_quant.core.qparams import QParams
from torch_quant.graph.sites import Site
from torch_quant.statistics import Statistic, register_statistic


class Products(Statistic):
    """Sums of products of the last dimension's elements: what a Hessian of a linear layer is."""

    name = "products"

    def __init__(self) -> None:
        super().__init__()
        self.sums = torch.zeros(0, 0)

    def observe(self, x: Tensor) -> None:
        if not bool(torch.isfinite(x).all()):
            raise QuantError("the tensor holds NaN or Inf")
        rows = x.detach().reshape(-1, x.shape[-1])
        self.sums = rows.T @ rows + (self.sums if self.batches else 0.0)
        self.batches += 1

    def _merge(self, other: Products) -> None:
        self.sums = self.sums + other.sums

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "sums": self.sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches, self.sums = state["batches"], state["sums"]


@dataclass(frozen=True)
class FeedBack(WeightMethod):
    """Rounds a column after the other, and corrects the rest by what the inputs say (as GPTQ)."""

    name = "feed_back"

    damping: float = 0.01

    def refusal(self, site: Site) -> str:
        return "" if site.op == "linear" else "it knows linear layers only"

    def statistics(self, site: Site) -> Wanted:
        return {site.inputs[0]: {"products": partial(Products)}}

    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: Mapping[str, Statistic]
    ) -> tuple[Tensor, QParams]:
        products = statistics["products"]
        assert isinstance(products, Products)
        _, qparams = RoundToNearest().quantize(weight, spec, {})
        hessian = products.sums + self.damping * products.sums.diagonal().mean() * torch.eye(
            len(products.sums)
        )
        inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
        rest, scale = weight.clone(), qparams.scale
        codes = torch.empty_like(weight, dtype=spec.dtype)
        for j in range(weight.shape[1]):
            column = (rest[:, j : j + 1] / scale).round().clamp(spec.quant_min, spec.quant_max)
            codes[:, j : j + 1] = column.to(spec.dtype)
            error = (rest[:, j : j + 1] - column * scale) / inverse[j, j]
            rest[:, j:] -= error * inverse[j : j + 1, j:]
        return codes, qparams


FOUR = QuantSpec.of(bits=4, signed=True, symmetric=True, per_channel=True)


def test_a_weight_method_is_one_class(tmp_path: Path) -> None:
    register_statistic(Products)
    register_weight_method(FeedBack)
    model, x = MODELS["mlp"](), example("mlp", 64)
    quantizer, quant_model = check_workflow(
        model,
        (x, {}),
        "2",
        tmp_path,
        least=10.0,
        summary_is_all=False,
        backend="reference",
        qconfig=QConfig(weight=FOUR, method=FeedBack(damping=0.02)),
    )
    assert quantizer.plan["2"].method == FeedBack(0.02)
    assert {"range", "products"} in [set(kept) for kept in quantizer.state.statistics.values()]
    again = Quantizer.from_config(quantizer.to_config())
    assert again.qconfig == quantizer.qconfig
    again.calib(model)(*x)
    assert again.explain("2")["method"].value == FeedBack(0.02)
    assert quant_model(*x).shape == model(*x).shape


def test_it_is_nearer_to_float_than_rounding(tmp_path: Path) -> None:
    """Inputs that are strongly correlated: there the feedback pays."""
    register_statistic(Products)
    register_weight_method(FeedBack)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
    layer = torch.nn.Linear(32, 16)
    errors = []
    for method in (None, FeedBack()):
        quantizer = Quantizer("reference", qconfig=QConfig(weight=FOUR, method=method))
        quantizer.calib(layer)(x)
        quant_model = quantizer.quantize(layer)
        errors.append(float((quant_model(x) - layer(x)).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_parts_of_the_data_merge() -> None:
    register_statistic(Products)
    register_weight_method(FeedBack)
    layer, x = torch.nn.Linear(8, 4), torch.randn(40, 8)
    config = QConfig(weight=FOUR, method=FeedBack())
    whole, merged = (Quantizer("reference", qconfig=config) for _ in range(2))
    for part in x.split(10):
        whole.calib(layer)(part)
        other = Quantizer("reference", qconfig=config)
        other.calib(layer)(part)
        merged.merge(other)
    ours, theirs = merged.quantize(layer, example_inputs=x), whole.quantize(layer)
    assert torch.equal(ours(x), theirs(x))


def test_dequantized_codes_are_what_it_says() -> None:
    weight = torch.randn(4, 6)
    spec = QuantSpec.of(bits=8, signed=True, symmetric=True, granularity=FOUR.granularity.on(0))
    codes, qparams = RoundToNearest().quantize(weight, spec, {})
    far = (dequantize(codes, qparams) - weight).abs().max()
    assert float(far) <= float(qparams.scale.max()) / 2 * 1.001  # half a step, and rounding


@dataclass(frozen=True)
class Sized(WeightMethod):
    """Notes its option, a tuple, with what it rounds."""

    name = "sized"

    sizes: tuple[int, ...] = (1, 2)

    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: Mapping[str, Statistic]
    ) -> tuple[Tensor, QParams]:
        SEEN.append(self.sizes)
        return RoundToNearest().quantize(weight, spec, statistics)


SEEN: list[tuple[int, ...]] = []


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_tied_weights_may_have_two_methods() -> None:
    register_weight_method(Sized)
    SEEN.clear()
    overrides = {name: QConfig(method=Sized((i,))) for i, name in enumerate(("a", "b"))}
    quantizer = Quantizer("reference", overrides=overrides)
    quantizer.calib(model := Tied())(torch.randn(4, 8))
    quantizer.quantize(model)
    assert SEEN == [(0,), (1,)]


def test_options_that_are_tuples_come_back_from_json() -> None:
    register_weight_method(Sized)
    config = QConfig(method=Sized((3, 4)))
    assert QConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(InvalidConfig, match="'sized' is taken by Sized"):
        register_weight_method(dataclass(frozen=True)(type("Other", (Sized,), {"name": "sized"})))


def test_what_it_would_get_wrong_is_refused() -> None:
    """The statistics of an input that a transform changes, and matrices quantized together."""
    register_statistic(Products)
    register_weight_method(FeedBack)
    config = QConfig(weight=FOUR, method=FeedBack(), transforms=[SmoothQuant(0.5)])
    quantizer = Quantizer("reference", qconfig=config)
    quantizer.calib(layer := torch.nn.Linear(8, 4))(torch.randn(40, 8))
    with pytest.raises(InvalidConfig, match=r"which smoothquant.* changes; use one of them"):
        quantizer.quantize(layer)

    @register_weight_method
    @dataclass(frozen=True)
    class Anywhere(FeedBack):
        name = "anywhere"

        def refusal(self, site: Site) -> str:
            return ""

    lstm = torch.nn.LSTM(8, 4)
    quantizer = Quantizer("reference", qconfig=QConfig(method=Anywhere()))
    quantizer.calib(lstm)(torch.randn(5, 3, 8))
    quantizer.quantize(lstm)
    assert quantizer.plan["lstm"].method is None
    assert "quantized together" in quantizer.explain("lstm")["method"].why
