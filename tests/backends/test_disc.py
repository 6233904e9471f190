"""TorchScript for torch_blade: the form that it takes, REFERENCE's numbers, and what is refused.

torch_blade itself cannot be installed here; its requirements are those of BladeDISC's CPU pattern.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import calibrated
from models import MODELS, example
from torch import Tensor, nn

import torch_quant
from torch_quant import (
    Backend,
    InvalidConfig,
    QConfig,
    Quantizer,
    UnsupportedOp,
    export_torchscript,
    recipes,
    sqnr,
)
from torch_quant.backends import DiscBackend, ReferenceBackend


class Net(nn.Module):
    """Layers that share an input, follow each other behind moves, and are called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16, bias=False)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.conv = nn.Conv1d(16, 16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (x.size(0), x.size(1), 2, 8)
        q, k, v = (each(x).view(shape).transpose(1, 2) for each in (self.q, self.k, self.v))
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        y = self.out(a.transpose(1, 2).reshape(x.shape)) + x
        z = self.down(self.up(y).relu())
        return self.conv((z + y).transpose(1, 2)), self.down(self.up(z.reshape(x.shape)))


def quantizer_of(backend: Backend | str, model: nn.Module, x: Tensor, **more: Any) -> Quantizer:
    return calibrated(model, [((x,), {})], backend=backend, **{"qconfig": QConfig(), **more})


@pytest.mark.newest("IPEX, once imported, rewrites the float layers of any TorchScript")
@pytest.mark.parametrize("machine", ["x86", "aarch64"])
def test_the_file_computes_what_reference_does(machine: Any, tmp_path: Path) -> None:
    model, x, other = Net().eval(), torch.randn(3, 5, 16), torch.randn(2, 9, 16)
    backend = DiscBackend(machine=machine)
    quantizer = quantizer_of(backend, model, x)
    quant_model = quantizer.quantize(model)
    assert quantizer.plan.quantized == ("q", "k", "v", "out", "up", "down", "up@1", "down@1")
    simulation = Quantizer(ReferenceBackend(simulates=backend), qconfig=QConfig())
    simulation.load_state_dict(quantizer.state_dict())
    expected = simulation.quantize(model, example_inputs=x)
    traced = export_torchscript(quant_model, x, tmp_path / "disc.pt")
    loaded = torch.jit.load(tmp_path / "disc.pt")
    torch_quant.save(quant_model, tmp_path / "folder")
    again = torch_quant.load(tmp_path / "folder", model=Net().eval())
    program = torch.export.export(quant_model, (x,), strict=False).module()
    assert all(map(torch.equal, program(x), expected(x)))
    for inputs in (x, other, x):
        for found in (quant_model, traced, loaded, again, copy.deepcopy(quant_model)):
            assert all(map(torch.equal, found(inputs), expected(inputs)))
    for subject in (traced, loaded, tmp_path / "disc.pt"):
        report = backend.verify(subject, plan=quantizer.plan)
        assert report.complete
        assert len(report.quantized) == 8
    assert "8 of 8 linear layers" in str(report)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    wanted = "per_channel" if machine == "x86" else "per_tensor"
    assert f"aten::fake_quantize_{wanted}_affine" in kinds
    assert {kind.partition("::")[0] for kind in kinds} == {"aten", "prim"}
    wrong = DiscBackend(machine="aarch64" if machine == "x86" else "x86")
    with pytest.raises(InvalidConfig, match=r"q, its weight: expected .* got .*machine="):
        wrong.verify(traced)


def test_what_falls_back_is_float_and_a_model_in_pieces_is_checked_whole(tmp_path: Path) -> None:
    model, x = Net().eval(), torch.randn(3, 5, 16)
    quantizer = quantizer_of("disc", model, x, capture="modules", overrides={"up": None})
    traced = export_torchscript(quantizer.quantize(model), x, tmp_path / "pieces.pt")
    report = Backend.DISC.verify(traced)
    assert report.in_float == ("up", "up")
    assert set(report.quantized) == {"q", "k", "v", "out", "down"}
    whole = quantizer_of("disc", model, x)
    amp_model = whole.amp(model)
    amp_model(x)
    worst, *_ = whole.fallback(amp_model, num=1)
    traced = export_torchscript(whole.quantize(model), x, tmp_path / "mixed.pt")
    assert worst.partition("@")[0] in Backend.DISC.verify(traced).in_float
    whole.reset_fallback()
    whole.quantize(model)
    with pytest.raises(InvalidConfig, match=r"expected a linear layer between fake-quantizers"):
        Backend.DISC.verify(traced, plan=whole.plan)


def test_what_was_trained_is_what_the_file_computes(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(16, 8)
    quantizer = quantizer_of("disc", model.eval(), x)
    qat_model = quantizer.qat(model)
    optimizer = torch.optim.SGD(qat_model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.enable_grad():
            qat_model(x).square().mean().backward()
        optimizer.step()
    trained = quantizer.quantize(qat_model.eval())
    assert not torch.equal(trained(x), quantizer.quantize(model)(x))
    traced = export_torchscript(trained, x, tmp_path / "trained.pt")
    assert Backend.DISC.verify(traced).quantized == ("0", "2")
    assert torch.equal(traced(x), qat_model(x))


def test_formats_that_torch_blade_has_not() -> None:
    model, x = MODELS["mlp"]().eval(), example("mlp", 8)
    for config, reason in (
        (recipes.int8_dynamic(), "scales are chosen while calibrating"),
        (recipes.int8_weight_only(), "quantized activations, not float"),
        (QConfig(input=recipes.int8_dynamic().input), "scales are chosen while calibrating"),
    ):
        with pytest.raises(UnsupportedOp, match=reason):
            Quantizer("disc", qconfig=config).quantize(model, example_inputs=x)
    with pytest.raises(InvalidConfig, match="machine='arm': expected"):
        DiscBackend(machine="arm")  # type: ignore[arg-type]


def test_ranges_that_were_recorded_for_another_backend() -> None:
    """A result behind which an activation function stands was not recorded: told, and in float."""
    model, x = Net().eval(), torch.randn(3, 5, 16)
    quantizer = quantizer_of("reference", model, x)
    quantizer.quantize(model, backend="disc")
    assert "up" not in quantizer.plan.quantized
    assert "calibrate with Quantizer('disc')" in quantizer.plan["up"].reason
    assert "q" in quantizer.plan.quantized
    onward = quantizer_of("disc", model, x)
    onward.quantize(model, backend="onednn")
    assert {"up", "down", "conv"} <= set(onward.plan.quantized)


@pytest.mark.parametrize("join", ["load", "merge"])
def test_results_that_were_recorded_in_some_batches_only(join: str) -> None:
    """Their range is that of fewer data than the inputs': told, and in float."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(4, 8)
    other = quantizer_of("onednn", model, 10 * x)
    quantizer = Quantizer("disc", qconfig=QConfig())
    if join == "load":
        quantizer.load_state_dict(other.state_dict())
    quantizer.calib(model)(x)
    if join == "merge":
        quantizer.merge(other)
    quantizer.quantize(model)
    assert "not recorded in 1 of 2 batches: calibrate" in quantizer.plan["0"].reason
    throughout = quantizer_of("disc", model, x)
    throughout.merge(quantizer_of("disc", model, 10 * x))
    throughout.quantize(model)
    assert throughout.plan.quantized == ("0", "2")


class WritesResult(nn.Module):
    """Something else reads what is written to the layer's result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y[:, ::2] = 0.5
        return self.second(x) + y


def test_a_result_that_is_written_to_stays_in_float(tmp_path: Path) -> None:
    model, x = WritesResult().eval(), torch.randn(4, 8)
    quantizer = quantizer_of("disc", model, x)
    traced = export_torchscript(quantizer.quantize(model), x, tmp_path / "written.pt")
    assert "written to in place" in quantizer.plan["first"].reason
    assert Backend.DISC.verify(traced, plan=quantizer.plan).quantized == ("second",)
    assert sqnr(model(x), traced(x)) > 30


class Tied(nn.Module):
    """A layer that is called twice, one with the same weight, and a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight, self.w = self.a.weight, nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.b(self.a(self.a(x)).relu()), self.w)


@pytest.mark.parametrize(
    ("model", "size", "floats"),
    [
        (nn.Linear(8, 8), (4, 8), ()),
        (nn.MultiheadAttention(8, 2, batch_first=True), (2, 3, 8), ("linear_1",)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 3, 8), ("linear1",)),
        (Tied(), (4, 8), ("a@1",)),
        (Tied(), (4, 8), ("b", "[l]inear")),
    ],
    ids=["bare", "attention", "encoder", "twice", "tied"],
)
def test_a_plan_is_found_whatever_the_weights_are_called(
    model: nn.Module, size: tuple[int, ...], floats: tuple[str, ...], tmp_path: Path
) -> None:
    x = torch.randn(size)
    inputs = (x, x, x) if isinstance(model, nn.MultiheadAttention) else (x,)

    def made(**more: Any) -> tuple[Any, Quantizer]:
        quantizer = calibrated(model.eval(), [(inputs, {})], backend="disc", **more)
        quant_model = quantizer.quantize(model)
        return export_torchscript(quant_model, inputs, tmp_path / "file.pt"), quantizer

    traced, quantizer = made(qconfig=QConfig())
    report = Backend.DISC.verify(traced, plan=quantizer.plan)
    assert len(report.quantized) == len(quantizer.plan.quantized)
    if floats:
        mixed, fewer = made(qconfig=QConfig(), overrides=dict.fromkeys(floats))
        report = Backend.DISC.verify(mixed, plan=fewer.plan)
        assert len(report.quantized) == len(fewer.plan.quantized)
        with pytest.raises(InvalidConfig, match="expected a linear layer between"):
            Backend.DISC.verify(mixed, plan=quantizer.plan)


class ByHand(nn.Module):
    """One layer with fake-quantizers, of which one thing can be made wrong.

    Args:
        wrong: what.
    """

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.wrong, self.fc = wrong, nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.full((4,), 0.1), requires_grad=False)
        kind = torch.float32 if wrong == "zeros" else torch.int32
        self.register_buffer("zero_point", torch.zeros(4, dtype=kind))
        if wrong == "offsets":
            self.zero_point += 1

    def forward(self, x: Tensor) -> Tensor:
        wrong = self.wrong
        low, high = (0, 255) if wrong == "unsigned" else (-128, 127)
        zero = 5 if wrong == "zero point" else 0
        if wrong == "scale":
            tensors = (torch.tensor(0.1), torch.tensor(0, dtype=torch.int32))
            x = torch.fake_quantize_per_tensor_affine(x, *tensors, low, high)
        elif wrong != "input":
            x = torch.fake_quantize_per_tensor_affine(x, 0.1, zero, low, high)
        axis = 1 if wrong == "axis" else 0
        weight = self.fc.weight
        if wrong != "weight":
            grid = (self.scale, self.zero_point, axis, -128, 127)
            weight = torch.fake_quantize_per_channel_affine(weight, *grid)
        y = nn.functional.linear(x, weight, self.fc.bias)
        if wrong == "between":
            y = y.relu()
        if wrong != "result":
            z = torch.fake_quantize_per_tensor_affine(y, 0.1, 0, -128, 127)
        if wrong in ("readers", "result"):
            return y + (z if wrong == "readers" else 0)
        return z


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("", ""),
        ("input", "fc, its input: expected a fake-quantizer directly there; got prim::Param"),
        ("weight", "fc, its weight: expected a fake-quantizer directly there"),
        ("result", "fc, its result: expected a fake-quantizer directly there"),
        ("between", "fc, its result: .*got aten::relu"),
        ("readers", "fc, its result: .*got 2 readers: aten::add, aten::fake_quantize"),
        ("scale", "fc, its input: expected scale as a constant float; got a tensor"),
        ("zero point", "fc, its input: expected zero point 0, .*; got 5"),
        ("unsigned", "fc, its input: expected codes from -128 to 127; got codes from 0 to 255"),
        ("axis", "fc, its weight: expected axis 0; got axis 1"),
        ("zeros", "fc, its weight: expected zero points in int32; got torch.float32"),
        ("offsets", "fc, its weight: expected zero points 0"),
        ("frozen", "a constant: the module was frozen"),
        ("training", "expected eval mode; got training mode: trace model.eval"),
    ],
)
def test_each_requirement_is_checked(wrong: str, message: str) -> None:
    model = ByHand(wrong).train(wrong == "training")
    traced = torch.jit.trace(model, torch.randn(2, 4), check_trace=False)
    if wrong == "frozen":
        traced = torch.jit.freeze(traced.eval())
    backend = DiscBackend(machine="x86")
    if not message:
        assert backend.verify(traced).quantized == ("fc",)
        return
    with pytest.raises(InvalidConfig, match=message):
        backend.verify(traced)


def test_other_operators_and_what_is_no_torchscript(tmp_path: Path) -> None:
    model, x = MODELS["mlp"]().eval(), example("mlp", 8)
    quantizer = calibrated(model, [(x, {})], backend="onednn", qconfig=QConfig())
    traced = export_torchscript(quantizer.quantize(model), x, tmp_path / "onednn.pt")
    with pytest.raises(InvalidConfig, match="expected operators of PyTorch alone; got torch_quant"):
        Backend.DISC.verify(traced)
    with pytest.raises(InvalidConfig, match="expected traced TorchScript or its file, got"):
        Backend.DISC.verify(model)
    with pytest.raises(InvalidConfig, match="cannot read the TorchScript file"):
        Backend.DISC.verify(tmp_path / "none.pt")
    with pytest.raises(InvalidConfig, match="nothing is run"):
        Backend.DISC.verify(traced, x)
