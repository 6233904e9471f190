"""Weights that make up for what the layers before have lost: by least squares, and in a model."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from torch_quant import (
    AWQ,
    FLOAT,
    GPTQ,
    InvalidConfig,
    PerGroup,
    QConfig,
    Quantizer,
    QuantSpec,
    RoundToNearest,
    sqnr,
)
from torch_quant.algorithms.blocks import Block, Layer, Sample
from torch_quant.algorithms.drift import drifts, made_up_for
from torch_quant.graph.sites import Site

SPEC = QuantSpec.of("int3", granularity=PerGroup(16))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_solution_by_least_squares() -> None:
    weight, exact = drawn(0, 5, 8), drawn(1, 200, 8)
    x = exact @ (torch.eye(8) + 0.3 * drawn(2, 8, 8)) + 0.1 * drawn(3, 200, 8)
    drift, moments = (exact - x).T @ x / 200, x.T @ x / 200
    found = made_up_for(weight, drift, moments, 0.0)
    expected = torch.linalg.lstsq(x, exact @ weight.T).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(made_up_for(weight, torch.zeros(8, 8), moments, 0.01), weight)


def test_moments_that_cannot_be_inverted_change_nothing() -> None:
    weight, moments = drawn(0, 5, 8), torch.ones(8, 8)
    moments[0, 0] = -1.0
    assert made_up_for(weight, drawn(1, 8, 8), moments, 0.0) is weight


class Part(nn.Module):
    """Layers one of which reads some of the vectors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.some = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x)) + self.second(x)
        y = x + y
        chosen = y[..., 0] > 0
        y = y.clone()
        y[chosen] = y[chosen] + self.some(y[chosen])
        return y


def block_of(part: Part) -> Block:
    layers = []
    for name, module in part.named_children():
        site = Site(name, "linear", name, (f"{name} x",), (), name, 8, (16, 16), smoothable=True)
        layers.append(Layer(name, name, module, SPEC.on(0), GPTQ(), (), site))
    floats = [drawn(10 + i, 1, 40, 16) for i in range(3)]
    moved = [x + 0.2 * drawn(20 + i, 1, 40, 16) for i, x in enumerate(floats)]
    block = Block("", part, tuple(layers), [Sample((x,), {}, 0) for x in moved])
    block.floats = [Sample((x,), {}, 0) for x in floats]
    return block


def test_drifts_are_those_of_the_tensors_that_layers_read() -> None:
    part = Part().eval().requires_grad_(False)
    block = block_of(part)
    found = drifts(block, block.layers)
    first, second, some = block.layers
    assert some not in found  # other vectors may be chosen in the float model
    assert block.floats is not None
    pairs = [(a.hidden[0], b.hidden[0]) for a, b in zip(block.samples, block.floats, strict=True)]
    expected = torch.stack([(b - a).T @ a for a, b in pairs]).sum(0) / 120
    torch.testing.assert_close(found[first][1], expected)
    torch.testing.assert_close(found[second][1], expected)
    assert found[first][0].rows == 120


def test_float_inputs_go_through_float_weights() -> None:
    """Though layers of the block are rounded already, as they are with ``sequential``."""
    part = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval().requires_grad_(False)
    floats = drawn(0, 1, 64, 16)
    exact = part[0](floats)[0]
    layers = []
    for name, module in part.named_children():
        site = Site(name, "linear", name, (f"{name} x",), (), name, 8, (16, 16), smoothable=True)
        layers.append(Layer(name, name, module, SPEC.on(0), GPTQ(), (), site))
    block = Block("", part, tuple(layers), [Sample((floats,), {}, 0)])
    block.floats = block.samples
    assert not drifts(block, layers[1:])[layers[1]][1].any()
    layers[0].round_to(*RoundToNearest().quantize(layers[0].weight, SPEC.on(0), {}))
    x = part[0](floats)[0]
    torch.testing.assert_close(drifts(block, layers[1:])[layers[1]][1], (exact - x).T @ x / 64)


class Deep(nn.Module):
    """Residual blocks one behind the other, each of which loses some."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Step() for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = 0.5 * x + 2.0 * self.down(torch.relu(self.up(self.norm(x))))
        return made


def deep() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Deep().eval().requires_grad_(False)


def quantizer_of(method: GPTQ, **options: object) -> Quantizer:
    config = QConfig(FLOAT, SPEC, method=method, **options)  # type: ignore[arg-type]
    return Quantizer("reference", qconfig=config, capture="modules")


MIX = drawn(5, 12, 32)


def batches(seed: int, count: int) -> list[Tensor]:
    """Of 12 factors and a little noise."""
    return [
        drawn(seed + i, 1, 64, 12) @ MIX + 0.1 * drawn(seed + 500 + i, 1, 64, 32)
        for i in range(count)
    ]


def quality(method: GPTQ, count: int = 40) -> float:
    """Output SQNR in dB on other data."""
    model, quantizer = deep(), quantizer_of(method)
    quantizer.round_weights(model, batches(1000, count), progress=False)
    x = torch.cat(batches(5000, 8))
    with torch.no_grad():
        return sqnr(model(x), quantizer.quantize(model)(x))


def test_it_pays_in_a_deep_model() -> None:
    plain = quality(GPTQ(full_range=True))
    assert quality(GPTQ(full_range=True, match_float=True)) > plain + 0.8
    assert quality(GPTQ(full_range=True, match_float=True, sequential=True)) > plain + 2.0


def test_with_few_vectors_it_is_gptq() -> None:
    """One batch has 64 vectors: enough for 32 channels, not for 64."""
    model, found = deep(), {}
    for match in (False, True):
        quantizer = quantizer_of(GPTQ(full_range=True, match_float=match, clip_search=False))
        quantizer.round_weights(model, [batches(1000, 1)[0][:, :40]], progress=False)
        found[match] = quantizer.quantize(model).state_dict()
    assert all(torch.equal(found[False][key], x) for key, x in found[True].items())


def test_interrupted_and_with_scales(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, data = deep(), batches(1000, 6)
    method, made = GPTQ(full_range=True, match_float=True), []
    for folder in (None, tmp_path / "kept", tmp_path / "kept"):
        quantizer = quantizer_of(method, transforms=(AWQ(),))
        with caplog.at_level(logging.WARNING):
            quantizer.round_weights(model, data, folder=folder, progress=False)
        made.append(quantizer.quantize(model).state_dict())
    assert not caplog.text
    assert all(torch.equal(x, each[key]) for each in made[1:] for key, x in made[0].items())
    other = quantizer_of(GPTQ(full_range=True), transforms=(AWQ(),))
    with pytest.raises(InvalidConfig, match="other settings"):
        other.round_weights(model, data, folder=tmp_path / "kept", progress=False)


def test_other_methods_of_the_block_may_have_rounded_before() -> None:
    model = deep()
    config = QConfig(FLOAT, SPEC, method=GPTQ(full_range=True, match_float=True))
    eight = QConfig(FLOAT, QuantSpec.of("int8"), method=RoundToNearest())
    quantizer = Quantizer("reference", qconfig=config, overrides={"*.up": eight}, capture="modules")
    quantizer.round_weights(model, batches(1000, 4), progress=False)
    x = torch.cat(batches(5000, 4))
    with torch.no_grad():
        assert sqnr(model(x), quantizer.quantize(model)(x)) > 12


def test_a_wrong_option() -> None:
    with pytest.raises(InvalidConfig, match=r"GPTQ\(match_float=1\): expected True or False"):
        GPTQ(match_float=1)  # type: ignore[arg-type]
