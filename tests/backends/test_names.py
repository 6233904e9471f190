"""Buffers of a quantized model are called as the float model's own tensors."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from awkward import AWKWARD
from flows import BACKENDS, calibrated
from models import normal, seeded, tokens
from torch import Tensor, nn

from torch_quant import (
    Backend,
    ModuleFilter,
    QConfig,
    QuantSpec,
    SmoothQuant,
    export_torchscript,
    recipes,
    sqnr,
)
from torch_quant.backends.reference import ReferenceBackend

ADDED = re.compile(r"_(scale|zero_point)(_rows)?$")
INPUT = re.compile(r"\.input(_scale|_zero_point)$")


class Alike(nn.Module):
    """Two paths that differ in what is no identifier, and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Module()
        self.a.b = nn.Linear(16, 16)
        self.a_b = nn.Linear(16, 16)
        self.add_module("block-1", nn.Linear(16, 16))
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule("block-1")(self.a_b(self.a.b(x)))
        for layer in self.layers:
            x = layer(x).relu()
        return self.norm(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(64, 16), nn.LayerNorm(16)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(self.embed(ids))))


class Computed(nn.Module):
    """Weights that are transposed, normed and folded with a batch norm, and a functional one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 16))
        self.fc = nn.Module()  # GPT-2's Conv1D
        self.fc.weight, self.fc.bias = (
            nn.Parameter(torch.randn(16, 8)),
            nn.Parameter(torch.randn(8)),
        )
        self.kernel = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu().mean((2, 3))
        x = torch.addmm(self.fc.bias, self.normed(x), self.fc.weight)
        return nn.functional.linear(x, self.kernel)


class InPieces(nn.Module):
    """Its encoder is one graph, its head another."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.head, self.norm = nn.Linear(16, 4), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.encoder(x))
        if float(x.sum()) > 1e9:
            x = x + 1
        return self.head(x)


def image() -> Tensor:
    return normal(2, 3, 8, 8)


CASES: dict[str, tuple[type[nn.Module], Callable[[], Tensor]]] = {
    "alike": (Alike, lambda: normal(4, 16)),
    "tied": (Tied, lambda: tokens(2)),
    "computed": (Computed, image),
    "in_pieces": (InPieces, lambda: normal(4, 16)),
}
COMPUTED = {"normed.weight", "conv.bias"}
"""Names that the float model has a place for and no tensor."""
NORM = {f"bn.{x}" for x in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
GONE: dict[str, list[set[str]]] = {
    "alike": [set()],
    "tied": [{"embed.weight"}, {"head.weight"}],
    "computed": [NORM | {f"normed.parametrizations.weight.original{i}" for i in (0, 1)}],
    "in_pieces": [set()],
}
"""What the quantized model computes with others, or has under one name of two."""
READERS = {
    "alike": ("a.b", "a_b", "block-1", "layers.0", "layers.1"),
    "tied": ("mix", "head"),
    "computed": ("conv", "normed", "linear", "linear_1"),
    "in_pieces": ("encoder.0", "encoder.2", "head"),
}
GRIDS = {
    name: {f"{site}.input_{x}" for site in sites for x in ("scale", "zero_point")}
    for name, sites in READERS.items()
}
"""Of what each site reads: no two of these share a tensor."""


def cases() -> Iterator[tuple[str, str]]:
    yield from ((name, backend) for name in CASES for backend in BACKENDS)


def quantized(name: str, backend: str) -> tuple[nn.Module, nn.Module, Tensor]:
    build, example = CASES[name]
    model, x = seeded(build).eval(), example()
    plain = QConfig()  # biases are the model's own, so tied ones stay one tensor
    quantizer = calibrated(model, [((x,), {})], backend=backend, qconfig=plain)
    return model, quantizer.quantize(model), x


@pytest.mark.parametrize(("name", "backend"), list(cases()))
def test_names_are_the_models_own(name: str, backend: str) -> None:
    model, quant_model, x = quantized(name, backend)
    state, found = model.state_dict(), quant_model.state_dict()
    grids = {key for key in found if INPUT.search(key)}
    assert grids == (GRIDS[name] if backend == "reference" else set())  # kernels take numbers
    found = {key: value for key, value in found.items() if key not in grids}
    assert {ADDED.sub("", key) for key in found} <= {*state, *COMPUTED}
    assert state.keys() - found.keys() in GONE[name]
    for key, value in found.items():
        if key in state and key != "fc.weight":
            assert value.shape == state[key].shape
    integers = {key for key, value in found.items() if value.dtype == torch.int8}
    assert integers == {key for key in found if key.endswith(("weight", "kernel"))} - {
        "norm.weight"
    }
    twin = copy.deepcopy(quant_model)
    assert twin.state_dict().keys() == {*found, *grids}
    assert torch.equal(twin(x), quant_model(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_modules_called_alike_have_names_of_their_own(backend: str) -> None:
    model, quant_model, _ = quantized("alike", backend)
    found = quant_model.state_dict()
    for path in ("a.b", "a_b", "block-1", "layers.0", "layers.1"):
        for key in (f"{path}.weight", f"{path}.bias"):
            scale = found.get(f"{key}_scale")
            if scale is None:  # a bias in float
                assert torch.equal(found[key], model.get_parameter(key))
            else:
                real = found[key] * scale.view(-1, *[1] * (found[key].dim() - 1))
                assert torch.allclose(real, model.get_parameter(key), atol=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tied_weight_in_float_and_in_int8(backend: str) -> None:
    """The float one keeps the name; the scale goes with the int8 one."""
    model, x = seeded(Tied).eval(), tokens(2)
    only = ModuleFilter(exclude_names="head")
    quantizer = calibrated(model, [((x,), {})], backend=backend, module_filter=only)
    found = quantizer.quantize(model).state_dict()
    (name,) = {"embed.weight", "head.weight"} & set(found)
    assert torch.equal(found[name], model.embed.weight)
    assert found[f"{name}_1"].dtype == torch.int8
    assert not {f"{name}_scale", f"{name}_scale_rows"} & set(found)


MADE = ("weight", "bias", "smooth_inverse", "input")


@pytest.mark.parametrize("name", ["alike", "normed_weights", "standardized_conv"])
def test_smoothed_and_fallen_back_tensors_have_names_too(name: str) -> None:
    if name == "alike":
        model, inputs = seeded(Alike).eval(), ((normal(4, 16),), {})
    else:
        model, inputs = AWKWARD[name].build(), AWKWARD[name].inputs(4)
    config = QConfig(transforms=[SmoothQuant(0.5)]) if name == "alike" else QConfig()
    quantizer = calibrated(model, [inputs], backend="reference", qconfig=config)
    quantizer.quantize(model)
    fallen = {quantizer.plan.quantized[-1]: "bfloat16"}
    quantizer.load_state_dict(quantizer.state_dict() | {"fallback": fallen})
    found = {ADDED.sub("", each) for each in quantizer.quantize(model).state_dict()}
    paths = [path for path, _ in model.named_modules() if path]
    made = {f"{path}.{role}" for path in paths for role in MADE}
    assert found <= {*model.state_dict(), *made}


class Shared(nn.Module):
    """Two layers on one tensor, a product, attention and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.query(x), self.key(x)
        y = nn.functional.scaled_dot_product_attention(query, key.tanh(), x)
        return self.lstm(y)[0] + torch.matmul(x, key.sigmoid().transpose(1, 2)) @ y


def test_scales_are_called_after_the_first_site_that_reads_the_tensor() -> None:
    model, x = seeded(Shared).eval(), normal(2, 5, 8)
    one = recipes.int8_static(row_scales=False)
    quantizer = calibrated(model, [((x,), {})], backend="reference", qconfig=one)
    found = quantizer.quantize(model).state_dict()
    read = {key.removesuffix("_scale") for key in found if key.endswith("_scale")}
    attention = "scaled_dot_product_attention"
    assert {name for name in read if "weight" not in name} == {
        "query.input",  # of x, which the key, attention's value and a product read too
        f"{attention}.input",
        f"{attention}.input_1",
        f"{attention}.probabilities",
        "lstm.input",
        "lstm.hidden",
        "matmul.input_1",
        "matmul_1.input",
    }
    ranges = quantizer.state.qparams(":x", QuantSpec())
    assert torch.equal(found["query.input_scale"], ranges.scale)
    assert torch.equal(found["query.input_zero_point"], ranges.zero_point)


def test_a_quantized_result_that_no_site_reads_has_a_scale_of_its_own() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))).eval()
    backend = ReferenceBackend(Backend.get("onnx"))
    quantizer = calibrated(model, [((image(),), {})], backend=backend)
    found = set(quantizer.quantize(model).state_dict())
    assert {"0.input_scale", "1.input_scale", "1.output_scale"} <= found
    assert "0.output_scale" not in found


def test_new_ranges_can_be_written_into_the_buffers() -> None:
    """The graph has no other numbers: a model with the tensors of another computes as that does."""
    model, x = seeded(Alike).eval(), normal(4, 16)
    first, second = (
        calibrated(model, [((inputs,), {})], backend="reference", qconfig=QConfig()).quantize(model)
        for inputs in (x, normal(64, 16) * 3)
    )
    assert not torch.equal(first(x), second(x))
    with torch.no_grad():
        for name, buffer in first.named_buffers():
            buffer.copy_(second.get_buffer(name))
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "onnx"])
def test_any_name_goes_into_torchscript(backend: str, tmp_path: Path) -> None:
    _, quant_model, x = quantized("alike", backend)
    expected = quant_model(x)
    export_torchscript(quant_model, x, tmp_path / "m.pt")
    assert sqnr(expected, torch.jit.load(tmp_path / "m.pt")(x)) > 60
