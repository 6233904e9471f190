"""Models with several graphs, and with Python code between pieces, as their users treat them."""

from __future__ import annotations

import copy
import threading
from collections import UserDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from flows import BACKENDS, assert_unchanged, calibrated, snapshot
from models import normal, seeded
from torch import Tensor, nn

from torch_quant import (
    InvalidConfig,
    QConfig,
    Quantizer,
    QuantSpec,
    export_torchscript,
    recipes,
    sqnr,
)

pytestmark = pytest.mark.sparse


class Glue(nn.Module):
    """Cannot be one graph, owns a parameter, drops out by its mode, and loops over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        for layer in self.layers:
            x = F.dropout(layer(x), 0.5, self.training) * self.gain
        return self.layers[0](x) if len(self.layers) == 2 else x


class TwoPaths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.long, self.short = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            x = x * 2 + bias
        return self.long(x) if x.shape[1] > 6 else self.short(x)


class Experts(nn.Module):
    """Each row goes to one of four experts; some get none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        best, y = x[:, :4].argmax(-1), x.new_zeros(len(x), 16)
        for i, expert in enumerate(self.experts):
            rows = torch.where(best == i)[0]
            y[rows] = expert(x[rows])
        return y


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_may_get_no_row(backend: str) -> None:
    model = seeded(Experts)
    batches = [normal(size, 8) for size in (3, 512, 1)]
    quantizer = Quantizer(backend)
    calib_model = quantizer.calib(model)
    for x in batches:
        assert torch.equal(calib_model(x), model(x))
    amp_model = quantizer.amp(model)
    for x in batches:
        assert torch.equal(amp_model(x), model(x))
    assert len(quantizer.sensitivity(amp_model)) == 4
    quant_model = quantizer.quantize(model)
    for x in (normal(2, 8), normal(50, 8)):
        assert sqnr(model(x), quant_model(x)) > 25


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_may_be_called_layer_by_layer(backend: str) -> None:
    model, x = Glue().eval(), torch.randn(16, 8)
    quantizer = calibrated(model, [((x,), {})], backend=backend)
    assert torch.equal(quantizer.calib(model)(x), model(x))
    quant_model = quantizer.quantize(model)
    assert set(quantizer.plan.quantized) == {"layers.0", "layers.1"}
    assert sqnr(model(x), quant_model(x)) > 25
    assert torch.equal(copy.deepcopy(quant_model)(x), quant_model(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_done_to_a_proxy_does_not_reach_the_model(backend: str) -> None:
    model, x = Glue().eval(), torch.randn(16, 8)
    quantizer = Quantizer(backend)
    calib_model = quantizer.calib(model)
    calib_model(x)
    quant_model = quantizer.quantize(model)
    before = snapshot(model)
    for proxy in (calib_model, quant_model):
        proxy.requires_grad_(False)
        proxy.train()
    calib_model.double()
    quant_model.to(memory_format=torch.contiguous_format)
    assert_unchanged(model, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_proxies_stay_in_eval_mode(backend: str) -> None:
    model, x = Glue().eval(), torch.randn(16, 8)
    quantizer = Quantizer(backend)
    calib_model = quantizer.calib(model)
    assert torch.equal(calib_model.train()(x), model(x))
    quant_model = quantizer.quantize(model)
    expected = quant_model(x)
    assert torch.equal(quant_model.train()(x), expected)


def test_one_site_may_be_fed_by_different_tensors() -> None:
    model, x, bias = TwoPaths(), torch.randn(4, 7, 8), torch.randn(8)
    quantizer = calibrated(model, [((x,), {}), ((x, bias), {})])
    quant_model = quantizer.quantize(model)
    for args in ((x,), (x, bias)):
        assert sqnr(model(*args), quant_model(*args)) > 25


@pytest.mark.parametrize("length", [4, 10])
def test_tracing_takes_the_graph_of_the_example(length: int, tmp_path: Path) -> None:
    model = TwoPaths()
    batches = [((torch.randn(16, n, 8),), {}) for n in (10, 4)]
    quant_model = calibrated(model, batches).quantize(model)
    x = torch.randn(2, length, 8)
    expected = quant_model(x)
    assert torch.equal(export_torchscript(quant_model, (x,), tmp_path / "m.pt")(x), expected)
    program = torch.export.export(quant_model, (x,), strict=False)
    assert torch.equal(program.module()(x), expected)


def test_a_proxy_follows_replaced_parameters() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    calib_model = Quantizer().calib(model)
    calib_model(x)
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True)
    assert torch.equal(calib_model(x), model(x))


def test_a_part_that_is_called_follows_settings_that_changed() -> None:
    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.decoder = nn.Linear(8, 4)

        def get_encoder(self) -> nn.Module:
            return self.encoder

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.decoder(self.get_encoder()(x))
            return y

    def recorded(quantizer: Quantizer) -> set[tuple[str, str]]:
        found = quantizer.state.statistics.items()
        return {(key, what) for key, each in found for what in each}

    model, x = seeded(Coder).eval(), normal(8, 8)
    quantizer = Quantizer(recipes.fast(), backend="reference")
    calib_model = quantizer.calib(model)
    calib_model(x)
    calib_model.get_encoder()(x)
    quantizer.qconfig = recipes.int8_static()
    calib_model.get_encoder()(x)
    other = Quantizer(recipes.int8_static(), backend="reference")
    other.calib(model).get_encoder()(x)
    assert recorded(other) <= recorded(quantizer)


@pytest.mark.skipif("onednn" not in BACKENDS, reason="Backend.ONEDNN needs an x86 CPU")
def test_signed_activations_are_for_convolutions_of_onednn_too() -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)),
        torch.randn(2, 3, 8, 8),
    )
    signed = QConfig(input=QuantSpec.of(signed=True, symmetric=True))
    quantizer = calibrated(model, [((x,), {})], backend="onednn", qconfig=signed)
    assert sqnr(model(x), quantizer.quantize(model)(x)) > 25
    assert quantizer.plan.quantized == ("0", "2")


@pytest.mark.skipif("onednn" not in BACKENDS, reason="Backend.ONEDNN needs an x86 CPU")
def test_threads_may_share_a_model() -> None:
    model = nn.Conv2d(3, 4, 3)
    quant_model = calibrated(model, [((torch.randn(2, 3, 8, 8),), {})]).quantize(model)
    errors: list[BaseException] = []

    def serve(seed: int) -> None:
        try:
            for size in range(8, 24):
                with torch.no_grad():
                    quant_model(torch.randn(1 + seed % 3, 3, size, size + seed))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_an_override_by_class_covers_what_is_inside() -> None:
    model, x = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)), torch.randn(4, 8)

    class Block(nn.Sequential):
        pass

    model[0] = Block(nn.Linear(8, 8), nn.Linear(8, 8))
    quantizer = calibrated(
        model, [((x,), {})], overrides={Block: None, nn.Linear: QConfig(input=QuantSpec.of(bits=7))}
    )
    quantizer.quantize(model)
    assert quantizer.plan["1"].quantized
    outer = calibrated(model, [((x,), {})], overrides={Block: None})
    outer.quantize(model)
    assert outer.plan.quantized == ("1",)


def test_a_name_that_is_also_an_op_type() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.linear(x))

    model, x = Named(), torch.randn(4, 8)
    with pytest.raises(InvalidConfig, match="both an op type and a module"):
        calibrated(model, [((x,), {})], overrides={"linear": None}).quantize(model)
    quantizer = calibrated(model, [((x,), {})], overrides={"[l]inear": None})
    quantizer.quantize(model)
    assert quantizer.plan.quantized == ("head",)


def test_example_inputs_in_any_mapping(tmp_path: Path) -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    model = Keywords()
    inputs = UserDict(x=torch.randn(4, 8))  # as a tokenizer's BatchEncoding is
    quantizer = Quantizer()
    quantizer.calib(model, example_inputs=inputs)(**inputs)
    export_torchscript(quantizer.quantize(model), inputs, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_mode & 0o044  # others may read it


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scripted_child_stays_what_it_is(backend: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Sequential(nn.Linear(8, 8))))
    model, x = model.eval(), torch.randn(16, 8)
    quantizer = calibrated(model, [((x,), {})], backend=backend)
    assert torch.equal(quantizer.calib(model)(x), model(x))
    assert sqnr(model(x), quantizer.quantize(model)(x)) > 25
