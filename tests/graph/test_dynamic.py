"""The user says which sizes are free: only these are, and mistakes are named."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from models import Compute, images, normal, seeded
from test_budget import hierarchical
from torch import Tensor, nn

from torch_quant import Quantizer
from torch_quant.errors import InvalidConfig
from torch_quant.graph import budget
from torch_quant.graph.dynamic import checked_dynamic


def shapes(proxy: Any) -> list[list[tuple[int | str, ...]]]:
    return [graph.contract.shapes for _, graph in proxy.captured.root.graphs]


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_only_the_named_dimensions_of_an_image_are_free(batch: int) -> None:
    model = seeded(hierarchical)
    quantizer = Quantizer("reference", dynamic={"input": [0]})
    proxy = quantizer.calib(model)
    for x in (images(batch, 20), images(5, 20), images(batch, 14)):
        assert torch.equal(proxy(x), model(x))
    for (shape,), size in zip(shapes(proxy), (20, 14), strict=True):
        assert isinstance(shape[0], str)
        assert shape[1:] == (3, size, size)
    quantized = quantizer.quantize(model)
    for x in (images(3, 20), images(1, 14)):
        assert quantized(x).shape == model(x).shape


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x * 1 if mask is None else x * mask[..., None]


def test_inputs_that_are_not_named_follow() -> None:
    proxy = Quantizer("reference", dynamic={"x": [0]}).calib(Masked())
    assert torch.equal(proxy(normal(2, 6, 8)), normal(2, 6, 8))
    for length, batch in ((6, 2), (6, 3), (4, 3)):
        x, mask = normal(batch, length, 8), torch.ones(batch, length)
        assert torch.equal(proxy(x, mask=mask), x)
    assert len(shapes(proxy)) == 3


def test_a_named_input_may_be_left_out() -> None:
    proxy = Quantizer("reference", dynamic={"mask": [0]}).calib(Masked())
    assert torch.equal(proxy(normal(2, 6, 8)), normal(2, 6, 8))
    assert torch.equal(proxy(normal(3, 4, 8)), normal(3, 4, 8))
    assert len(shapes(proxy)) == 1


def test_no_dimension_at_all() -> None:
    model = seeded(lambda: nn.Linear(8, 8))
    proxy = Quantizer("reference", dynamic={"input": []}).calib(model)
    for batch in (1, 2, 2, 3):
        assert torch.equal(proxy(normal(batch, 8)), model(normal(batch, 8)))
    assert shapes(proxy) == [[(1, 8)], [(2, 8)], [(3, 8)]]


class Nested(nn.Module):
    def forward(self, batch: dict[str, Tensor], *rest: Tensor) -> Tensor:
        return batch["x"] + sum(rest)


def test_names_of_nested_and_unnamed_inputs() -> None:
    dynamic = {"args[0]['x']": [0], "args[1]": [0]}
    proxy = Quantizer("reference", dynamic=dynamic).calib(Nested())
    for batch in (2, 3):
        proxy({"x": normal(batch, 8)}, normal(batch, 8))
    ((first, second),) = shapes(proxy)
    assert first[1] == second[1] == 8
    for name in ("x", "batch['x']", "args[0]", "args[2]"):
        proxy = Quantizer("reference", dynamic={name: [0]}).calib(Nested())
        with pytest.raises(InvalidConfig, match=r"did you mean args\[\d\]"):
            proxy({"x": normal(2, 8)}, normal(2, 8))


@pytest.mark.parametrize(
    "wrong", [[0], {"x": 0}, {"x": "0"}, {"x": [-1]}, {"x": [True]}, {"x": [0.5]}, {0: [0]}]
)
def test_what_names_no_dimensions(wrong: Any) -> None:
    with pytest.raises(InvalidConfig, match=r'dynamic=\{"input_ids": \[0, 1\]\}'):
        Quantizer("reference", dynamic=wrong)


def test_mistakes_are_named() -> None:
    linear = seeded(lambda: nn.Linear(8, 8))
    with pytest.raises(InvalidConfig, match=r"dynamic names 'imput'.*did you mean input\?"):
        Quantizer("reference", dynamic={"imput": [0]}).calib(linear)
    proxy = Quantizer("reference", dynamic={"input": [0, 3]}).calib(linear)
    with pytest.raises(InvalidConfig, match=r"dimension 3, but input has shape \(2, 8\).*0 to 1"):
        proxy(normal(2, 8))
    proxy = Quantizer("reference", dynamic={"y": [0]}).calib(Compute(lambda x: x * 2))
    with pytest.raises(InvalidConfig, match="dynamic names 'y'"):
        proxy(normal(2, 8))


def test_the_settings_are_a_copy() -> None:
    axes = [0]
    found = checked_dynamic({"x": axes})
    axes.append(5)
    assert found == {"x": {0}}
    assert checked_dynamic(None) == {}


@torch.no_grad()
def test_the_advice_of_a_slow_capture_is_followed_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(budget, "SECONDS", 0.05)
    monkeypatch.setitem(budget._SHARES, "the batch size", 4000.0)
    model, x = seeded(hierarchical), images(2, 20)
    with caplog.at_level(logging.WARNING, logger="torch_quant"):
        Quantizer("reference").calib(model)(x)
    (record,) = caplog.records
    assert record.message.endswith("Quantizer(..., dynamic={'input': [0]})")
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="torch_quant"):
        proxy = Quantizer("reference", dynamic={"input": [0]}).calib(model)
        assert torch.equal(proxy(x), model(x))
    assert not caplog.records
