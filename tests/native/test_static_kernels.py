"""Linear layers between two known grids, against products in float64."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import calibrated
from torch import Tensor, nn
from torch.nn import functional as F

from torch_quant import Backend, InvalidConfig, export_torchscript, native
from torch_quant.backends.onednn import ops
from torch_quant.native import library, static

pytestmark = [
    pytest.mark.skipif(
        Backend.ONEDNN.unavailable() is not None,
        reason=f"Backend.ONEDNN: {Backend.ONEDNN.unavailable()}; run on an x86 CPU",
    ),
    pytest.mark.skipif(
        native.unavailable() is not None, reason=f"{native.unavailable()}: run on an x86 CPU"
    ),
]

FUNCTIONS: dict[str, tuple[str, list[float], str, Any]] = {
    "none": ("none", [], "none", lambda x: x),
    "relu": ("relu", [], "none", F.relu),
    "relu6": ("hardtanh", [0.0, 6.0], "none", F.relu6),
    "between": ("hardtanh", [-1.5, 0.5], "none", lambda x: x.clamp(-1.5, 0.5)),
    "leaky": ("leaky_relu", [0.2], "none", lambda x: F.leaky_relu(x, 0.2)),
    "gelu": ("gelu", [], "none", F.gelu),
    "gelu of tanh": ("gelu", [], "tanh", lambda x: F.gelu(x, approximate="tanh")),
    "silu": ("swish", [], "none", F.silu),
    "tanh": ("tanh", [], "none", torch.tanh),
    "hardswish": ("hardswish", [], "none", F.hardswish),
}
SIZES = ((1, 1, 1), (3, 7, 5), (8, 64, 32), (9, 33, 47), (17, 100, 16), (70, 12, 50), (2, 384, 700))
"""Rows, inputs, outputs: whole tiles, rests of each kind, several blocks of outputs."""


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """On each set of instructions, also where others would be faster."""
    kernels = library.kernels()
    assert kernels is not None
    monkeypatch.setattr(static, "packed_for", lambda: int(kernels.torch_quant_depth()))


class Layer:
    """Random operands of a layer, with codes and weights at the ends of their ranges."""

    def __init__(self, rows: int, inputs: int, outputs: int, bias: bool = True) -> None:
        made = torch.Generator().manual_seed(rows * 31 + inputs * 7 + outputs)
        self.x = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8, generator=made)
        self.weight = torch.randint(-128, 128, (outputs, inputs), generator=made).to(torch.int8)
        self.x[:, 0], self.weight[:, 0] = 255, -128
        self.weight_scale = torch.rand(outputs, generator=made) * 1e-3 + 1e-4
        self.bias = torch.randn(outputs, generator=made) if bias else None
        self.x_scale, self.x_zero = 0.02, 117
        self.factor: Tensor | None = None

    def exact(self, function: Any = lambda x: x) -> Tensor:
        """In float64, of what the operator gets."""
        x = (self.x.double() - self.x_zero) * self.x_scale
        y = x @ (self.weight.double() * self.weight_scale.double()[:, None]).T
        return function(y if self.bias is None else y + self.bias)

    def run(self, function: str = "none", out: tuple[Any, ...] = (1.0, 0, torch.float32)) -> Tensor:
        post_op, args, algorithm, _ = FUNCTIONS[function]
        return ops.LINEAR(  # type: ignore[no-any-return]
            self.x, self.x_scale, self.x_zero, self.weight, self.weight_scale, self.bias, *out,
            post_op, args, algorithm, self.factor,
        )  # fmt: skip


def near(found: Tensor, exact: Tensor, scale: float, zero: int) -> None:
    """Codes that are those of float64, but for numbers between two codes."""
    steps = exact / scale + zero
    assert found.dtype is torch.uint8
    error = (found.double() - steps.clamp(0, 255)).abs()
    assert float(error.max() if error.numel() else 0.0) <= 0.5 + 2e-3


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_floats_are_exact(sizes: tuple[int, int, int], bias: bool, instructions: str) -> None:
    layer = Layer(*sizes, bias)
    torch.testing.assert_close(layer.run().double(), layer.exact(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_codes_are_rounded_halves_to_even(sizes: tuple[int, int, int], instructions: str) -> None:
    layer = Layer(*sizes)
    near(layer.run(out=(0.05, 110, torch.uint8)), layer.exact(), 0.05, 110)
    # All sums are halves of a step: powers of 2.
    layer.x_scale, layer.bias, layer.x_zero = 0.5, None, 3
    layer.weight_scale.fill_(1.0)
    layer.weight %= 3
    sums = (layer.x.long() - 3) @ layer.weight.long().T
    expected = ((sums.double() * 0.5).round() + 100).clamp(0, 255)
    found = layer.run(out=(1.0, 100, torch.uint8))
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(function: str, instructions: str) -> None:
    layer = Layer(9, 40, 37)
    exact = layer.exact(FUNCTIONS[function][3])
    torch.testing.assert_close(layer.run(function).double(), exact, rtol=1e-4, atol=1e-5)
    near(layer.run(function, (0.02, 90, torch.uint8)), exact, 0.02, 90)
    near(layer.run(function, (0.02, 255, torch.uint8)), exact, 0.02, 255)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_factors_of_what_is_rounded(function: str, instructions: str) -> None:
    layer = Layer(9, 40, 37)
    layer.factor = torch.linspace(-0.5, 2.0, 37)
    exact = layer.exact(FUNCTIONS[function][3]) * layer.factor.double()
    near(layer.run(function, (0.02, 90, torch.uint8)), exact, 0.02, 90)


def test_sums_fill_32_bits(instructions: str) -> None:
    layer = Layer(1, static.MOST_INPUTS, 3, bias=False)
    layer.x.fill_(255)
    layer.x_zero = 0
    layer.weight.copy_(torch.tensor([127, -128, 1]).to(torch.int8)[:, None])
    layer.x_scale, layer.weight_scale = 1.0, torch.ones(3)
    expected = 255.0 * static.MOST_INPUTS * torch.tensor([[127.0, -128.0, 1.0]])
    torch.testing.assert_close(layer.run(), expected, rtol=1e-6, atol=0.0)


def test_a_row_depends_on_no_other_and_threads_change_nothing(instructions: str) -> None:
    layer = Layer(150, 129, 700)
    out = (0.05, 110, torch.uint8)
    whole, rows = layer.run("gelu", out), layer.x
    for count in (1, 2, 7, 64, 65):
        layer.x = rows[:count]
        assert torch.equal(layer.run("gelu", out), whole[:count])
    layer.x = rows
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(layer.run("gelu", out), whole)
    finally:
        torch.set_num_threads(before)
    found: list[Tensor] = []
    many = [threading.Thread(target=lambda: found.append(layer.run("gelu", out))) for _ in range(6)]
    for each in many:
        each.start()
    for each in many:
        each.join()
    assert len(found) == 6
    assert all(torch.equal(each, whole) for each in found)


def test_shapes_and_strides(instructions: str) -> None:
    layer = Layer(12, 10, 6)
    whole = layer.run()
    layer.x = layer.x.reshape(2, 3, 2, 10)
    assert torch.equal(layer.run(), whole.reshape(2, 3, 2, 6))
    layer.x = layer.x.transpose(0, 1)
    assert torch.equal(layer.run(), whole.reshape(2, 3, 2, 6).transpose(0, 1))
    layer.x = layer.x[0, 0, 0]
    assert torch.equal(layer.run(), whole[0])
    layer.x = layer.x.new_empty(0, 4, 10)
    assert layer.run().shape == (0, 4, 6)


def test_a_weight_that_changes_and_another_zero_point(instructions: str) -> None:
    layer = Layer(5, 24, 20)
    first = layer.run()
    layer.x_zero = 3
    other = layer.run()
    torch.testing.assert_close(other.double(), layer.exact(), rtol=1e-5, atol=1e-5)
    layer.x_zero = 117
    assert torch.equal(layer.run(), first)
    layer.weight.neg_()
    layer.weight_scale.mul_(2.0)
    assert layer.bias is not None
    layer.bias.add_(1.0)
    torch.testing.assert_close(layer.run().double(), layer.exact(), rtol=1e-5, atol=1e-5)


def convolved(x: Tensor, weight: Tensor, layer: Layer, *geometry: Any) -> Tensor:
    options = (*geometry, 0.05, 110, torch.uint8, "relu", [])
    scale, zero = layer.x_scale, layer.x_zero
    return ops.CONV(  # type: ignore[no-any-return]
        x, scale, zero, weight, layer.weight_scale, layer.bias, *options
    )


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
def test_convolutions_of_pixels(last: bool, instructions: str) -> None:
    layer = Layer(2 * 5 * 7, 20, 36)
    x = layer.x.reshape(2, 5, 7, 20).permute(0, 3, 1, 2)
    x = x if last else x.contiguous()
    weight = layer.weight[:, :, None, None]
    y = convolved(x, weight, layer, [1, 1], [0, 0], [1, 1], 1)
    assert y.stride()[1] == 1  # as its fake says
    exact = layer.exact(F.relu).reshape(2, 5, 7, 36).permute(0, 3, 1, 2)
    near(y, exact, 0.05, 110)
    # Others have no rows of pixels: they are oneDNN's.
    assert convolved(x, weight, layer, [2, 2], [0, 0], [1, 1], 1).shape == (2, 36, 3, 4)
    assert convolved(x, weight, layer, [1, 1], [1, 1], [1, 1], 1).shape == (2, 36, 7, 9)
    grouped = layer.weight[:, :10, None, None].contiguous()
    assert convolved(x, grouped, layer, [1, 1], [0, 0], [1, 1], 2).shape == (2, 36, 5, 7)


def test_what_the_kernel_lacks_goes_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*args: Any) -> Tensor:
        raise AssertionError("ours was called")

    layer = Layer(3, 8, 4)
    ours = layer.run()
    monkeypatch.setattr(static, "multiply", no)
    with pytest.raises(AssertionError, match="ours was called"):
        layer.run()
    monkeypatch.setattr(static, "packed_for", lambda: 0)  # AMX, no VNNI, no library
    torch.testing.assert_close(layer.run(), ours, rtol=1e-5, atol=1e-5)
    layer.factor = torch.linspace(0.5, 2.0, 4)
    for name, (_, _, _, function) in FUNCTIONS.items():
        found = layer.run(name, (0.02, 90, torch.uint8))
        near(found, layer.exact(function) * layer.factor.double(), 0.02, 90)


@pytest.mark.parametrize("wrong", ["fewer inputs", "more inputs", "bias", "factor", "scale"])
def test_sizes_that_do_not_fit_are_errors(wrong: str) -> None:
    layer = Layer(3, 32, 8)
    if wrong.endswith("inputs"):
        width = 16 if wrong.startswith("fewer") else 4000
        layer.x = torch.zeros(3, width, dtype=torch.uint8)
    elif wrong == "bias":
        layer.bias = torch.zeros(3)
    elif wrong == "factor":
        layer.factor = torch.zeros(3)
    else:
        layer.weight_scale = torch.ones(3)
    out = (0.05, 110, torch.uint8)
    with pytest.raises(InvalidConfig, match=f"expected .*(32 inputs|{wrong} of 8), got"):
        layer.run(out=out)
    if wrong.endswith("inputs"):
        image = layer.x[:1, :, None, None].contiguous(memory_format=torch.channels_last)
        with pytest.raises(InvalidConfig, match="expected 32 inputs, got"):
            convolved(image, layer.weight[:, :, None, None], layer, [1, 1], [0, 0], [1, 1], 1)


def test_a_file_without_guards_refuses_other_widths(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))
    x = torch.randn(4, 32)
    quant_model = calibrated(model, [((x,), {})], backend="onednn").quantize(model)
    export_torchscript(quant_model, x, tmp_path / "model.pt")
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    assert torch.equal(loaded(x), quant_model(x))
    for width in (20, 40, 100_000):
        with pytest.raises(Exception, match=f"expected 32 inputs, got {width}"):
            loaded(torch.randn(4, width))
    free = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    program = torch.export.export(quant_model, (x,), dynamic_shapes=free)
    assert torch.equal(program.module()(x), quant_model(x))
    with pytest.raises(Exception, match="32"):
        program.module()(torch.randn(4, 20))


WITHOUT = """
import torch
from test_static_kernels import FUNCTIONS, Layer, near
from torch_quant.native import static
assert static.packed_for() == 0
for name in ("gelu", "relu6"):
    layer = Layer(9, 40, 37)
    near(layer.run(name, (0.02, 90, torch.uint8)), layer.exact(FUNCTIONS[name][3]), 0.02, 90)
"""
"""For ``test_library``."""


def test_what_is_no_number_stays_none(instructions: str) -> None:
    layer = Layer(3, 8, 4)
    layer.weight_scale[1] = math.nan
    found = layer.run()
    assert found[:, 1].isnan().all()
    assert found[:, 0].isfinite().all()
