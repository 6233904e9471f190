"""Models on which scales or statistics would go where they do not belong."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_quant import (
    AWQ,
    GPTQ,
    TEQ,
    AutoRound,
    InvalidConfig,
    QuantError,
    Quantizer,
    recipes,
    sqnr,
)
from torch_quant.algorithms.blocks import Block

EIGHT = recipes.weight_only(bits=8, group_size=32)
SCALED = replace(EIGHT, transforms=(AWQ(),))


class Layer(nn.Module):
    """A norm whose channels differ, so that AWQ has something to do, and two layers behind it."""

    def __init__(self, norm: nn.LayerNorm | None = None) -> None:
        super().__init__()
        self.n = norm or nn.LayerNorm(32)
        with torch.no_grad():
            self.n.weight[::7] = 20.0
        self.u, self.d = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.d(torch.relu(self.u(self.n(x))))
        return y


class TwoWays(Layer):
    """Another layer for long inputs, which reads the same norm."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        up = self.image if x.shape[1] == 16 else self.u
        y: Tensor = x + self.d(torch.relu(up(self.n(x))))
        return y


class Gated(Layer):
    """One channel of the norm does more than the layers know."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(x)
        y: Tensor = x + self.d(torch.relu(self.u(h))) * torch.sigmoid(h[..., 6:7])
        return y


class Model(nn.Module):
    def __init__(self, kind: Any = Layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(kind() for _ in range(2))
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(self.end(x))
        return y

    def end(self, x: Tensor) -> Tensor:
        return x


class Again(Model):
    """The norm of the last block once more, as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.last = self.layers[-1].n

    def end(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(x)
        return y


class Borrowed(Model):
    """The parameters of that norm, read by code."""

    def end(self, x: Tensor) -> Tensor:
        norm = self.layers[-1].n
        return F.layer_norm(x, (32,), norm.weight, norm.bias)


def shared() -> Model:
    """One norm in both blocks."""
    model = Model()
    model.layers[1].n = model.layers[0].n
    return model


def data(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, length, 32, generator=generator) for length in lengths]


def quantized(model: nn.Module, config: Any, batches: list[Tensor]) -> tuple[Quantizer, Any]:
    quantizer = Quantizer(config, backend="reference", capture="modules")
    quantizer.round_weights(model, batches, progress=False)
    return quantizer, quantizer.quantize(model)


@pytest.mark.parametrize("kind", ["two ways", "gated", "again", "shared"])
def test_what_else_reads_a_scaled_tensor_is_noticed(kind: str) -> None:
    models = {"two ways": Model(TwoWays), "gated": Model(Gated), "again": Again()}
    model = (models.get(kind) or shared()).eval()
    batches = data(8, 8, 16, 16) if kind == "two ways" else data(8, 8)
    _, plain = quantized(model, EIGHT, batches)
    _, scaled = quantized(model, SCALED, batches)
    for x in batches:
        exact = model(x)
        assert sqnr(exact, scaled(x)) > sqnr(exact, plain(x)) - 3.0


def test_code_that_reads_a_scaled_parameter_is_noticed() -> None:
    model = Borrowed().eval()
    with pytest.raises(InvalidConfig, match="code outside of the blocks reads one of these"):
        quantized(model, SCALED, data(8))
    quantizer = Quantizer(SCALED, backend="reference", capture="modules")
    with pytest.raises(InvalidConfig, match="Nothing was rounded"):
        quantizer.round_weights(model, data(8), progress=False)
    assert not quantizer.state.rounded


def test_scales_do_pay() -> None:
    """Where nothing else reads the tensor, so that the tests above compare something."""
    model, batches = Model().eval(), data(8, 8)
    four = recipes.weight_only(bits=4, group_size=32)
    _, plain = quantized(model, four, batches)
    quantizer, scaled = quantized(model, replace(four, transforms=(AWQ(),)), batches)
    assert "layers.0.n.weight" in quantizer.state.rounded.scaled
    assert sqnr(model(batches[0]), scaled(batches[0])) > sqnr(model(batches[0]), plain(batches[0]))


def test_what_was_float_then_is_not_quantized_unscaled() -> None:
    model, batches = Model().eval(), data(8)
    quantizer = Quantizer(SCALED, backend="reference", overrides={"*.u": None})
    quantizer.round_weights(model, batches, progress=False)
    quantizer.overrides = {}
    with pytest.raises(InvalidConfig, match=r"layers.0.u .*run quantizer.round_weights"):
        quantizer.quantize(model)


def test_rounded_weights_of_two_runs_do_not_mix() -> None:
    model, batches = Model().eval(), data(8)
    ours, _ = quantized(model, SCALED, batches)
    theirs, _ = quantized(model, EIGHT, batches)
    with pytest.raises(InvalidConfig, match="which cannot be joined"):
        ours.merge(theirs)
    empty = Quantizer(SCALED, backend="reference", capture="modules")
    empty.merge(ours)
    again = empty.quantize(model, example_inputs=batches[0])
    assert torch.equal(again(batches[0]), ours.quantize(model)(batches[0]))


class Sums(nn.Module):
    """Two layers that read one tensor in the first batch, and two in the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.in_place = False

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            x = x.clone()
            x += self.a(x).relu() * 10
            x += self.b(x)
            return x
        other = x if x.shape[1] == 8 else x * 10
        y: Tensor = self.a(x) + self.b(other)
        return y


@pytest.mark.parametrize("in_place", [False, True])
def test_each_layer_has_the_statistics_of_what_it_read(in_place: bool) -> None:
    model, batches = Sums().eval(), data(8, 16, 16)
    model.in_place = in_place
    seen: dict[str, list[Tensor]] = {"a": [], "b": []}
    handles = [
        getattr(model, name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach().clone())
        )
        for name in seen
    ]
    for x in batches:
        model(x)
    for handle in handles:
        handle.remove()
    found: dict[str, Tensor] = {}
    real = Block.observe

    def observe(self: Block, layers: Any, method: Any) -> Any:
        known = real(self, layers, method)
        for site, each in known.items():
            (statistic,) = each.values()
            found[site] = copy.deepcopy(statistic.state_dict())  # GPTQ uses it up
        return known

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "observe", observe)
        config = recipes.weight_only(bits=4, group_size=32, method=GPTQ())
        quantizer = Quantizer(config, backend="reference", capture="modules")
        quantizer.round_weights(model, batches, progress=False)
    for name, inputs in seen.items():
        rows = torch.cat([x.reshape(-1, 32) for x in inputs])
        moments = rows.T @ rows
        tensors = [x for x in found[name].values() if isinstance(x, Tensor) and x.dim() == 2]
        (hessian,) = tensors
        ratio = hessian.diagonal() / moments.diagonal()
        torch.testing.assert_close(ratio, ratio.mean().expand(32), rtol=1e-3, atol=1e-6)
        cosine = F.cosine_similarity(hessian.flatten(), moments.flatten(), dim=0)
        assert float(cosine) > 0.9999


class Pyramid(nn.Module):
    """The head reads what every block gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(96, 8)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for layer in self.layers:
            x = layer(x)
            levels.append(x)
        y: Tensor = self.head(torch.cat(levels, -1))
        return y


def test_what_lies_behind_the_blocks_reads_the_rounded_ones() -> None:
    model, batches = Pyramid().eval(), data(8, 8)
    inputs: list[Tensor] = []
    config = recipes.weight_only(bits=4, group_size=32, method=GPTQ())
    quantizer = Quantizer(config, backend="reference", capture="modules")
    real = Block.observe

    def observe(self: Block, layers: Any, method: Any) -> Any:
        if not self.path:
            with self.watched(lambda layer, x: inputs.append(x.clone())):
                for sample in self.samples:
                    self.call(sample)
        return real(self, layers, method)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "observe", observe)
        quantizer.round_weights(model, batches, progress=False)
    quant_model, read = quantizer.quantize(model), []
    quant_model.head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    for x in batches:
        quant_model(x)
    assert all(sqnr(a, b) > 80 for a, b in zip(inputs, read, strict=True))


class Counts(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_the_buffers_of_the_model_are_its_own() -> None:
    model, batches = Model(Counts).eval(), data(8, 8)
    quantizer = Quantizer(EIGHT, backend="reference", capture="modules")
    quantizer.calib(model, example_inputs=batches[0])
    before = [layer.calls.clone() for layer in model.layers]
    state = torch.get_rng_state()
    quantizer.round_weights(model, batches, progress=False)
    assert [layer.calls for layer in model.layers] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folded_batch_norm_is_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 8)).eval()
    x = torch.randn(8, 32)
    quantizer = Quantizer(EIGHT, backend="reference", capture="whole")
    report = quantizer.round_weights(model, [x], progress=False)
    assert report.sites == ("2",)
    assert "1 weights are no parameter" in caplog.text
    assert sqnr(model(x), quantizer.quantize(model)(x)) > 35  # 8 bits


def test_inputs_of_another_kind() -> None:
    model = Model().eval()
    for wrong in (None, 3, torch.ones(2), {"x": 1}, "text"):
        with pytest.raises(InvalidConfig, match="expected a list or a generator of inputs"):
            Quantizer(EIGHT, backend="reference").round_weights(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="folder=5; expected the path of a folder"):
        Quantizer(EIGHT, backend="reference").round_weights(model, data(8), folder=5)  # type: ignore[arg-type]


class Broken(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y[0] = float("nan")
        return y


@pytest.mark.parametrize("method", ["autoround", "teq"])
def test_training_on_what_is_not_finite_or_has_no_gradient(method: str) -> None:
    four = recipes.weight_only(bits=4, group_size=32)
    if method == "teq":
        config = replace(four, transforms=(TEQ(iterations=3),))
    else:
        config = replace(four, method=AutoRound(iterations=3))
    if method == "autoround":  # TEQ finds nothing to scale there
        with pytest.raises(QuantError, match=r"the error of layers\.0 on sample 0 is not finite"):
            quantized(Model(Broken).eval(), config, data(8))
    model = Model(TwoWays).eval()
    quantizer = Quantizer(config, backend="reference", overrides={"*.u": None, "*.d": None})
    batches = data(8, 16)  # the first reaches no layer that is trained
    quantizer.round_weights(model, batches, progress=False)
    assert sqnr(model(batches[1]), quantizer.quantize(model)(batches[1])) > 10
    model = Model().eval()
    with torch.inference_mode():
        quantizer = Quantizer(config, backend="reference")
        quantizer.round_weights(model, data(8), progress=False)
