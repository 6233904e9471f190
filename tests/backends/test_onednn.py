"""oneDNN kernels against the reference, op by op on the same quantized inputs."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from flows import calibrated, run
from models import exact_copy
from torch import Tensor, nn

from torch_quant import Backend, QConfig, QuantSpec, sqnr
from torch_quant.backends import ReferenceBackend
from torch_quant.backends.onednn import ops as onednn_ops
from torch_quant.convert.quantized import QuantizedModule
from torch_quant.convert.quantized_graph import QuantizedGraph

pytestmark = pytest.mark.skipif(
    Backend.ONEDNN.unavailable() is not None,
    reason=f"Backend.ONEDNN: {Backend.ONEDNN.unavailable()}; run on an x86 CPU",
)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "hardswish": nn.Hardswish,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
}

Conv = Callable[[], nn.Module]
CONVS: dict[str, tuple[Conv, tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(8, 16, 3, padding=1), (8, 20)),
    "1d_dilated": (lambda: nn.Conv1d(8, 16, 3, dilation=2), (8, 20)),
    "2d": (lambda: nn.Conv2d(8, 16, 3, padding=1), (8, 9, 11)),
    "2d_no_bias": (lambda: nn.Conv2d(8, 16, 3, bias=False), (8, 9, 11)),
    "2d_strided": (lambda: nn.Conv2d(8, 16, (3, 2), stride=(2, 1)), (8, 9, 11)),
    "2d_grouped": (lambda: nn.Conv2d(8, 16, 3, groups=4), (8, 9, 11)),
    "2d_depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1), (8, 9, 11)),
    "2d_same": (lambda: nn.Conv2d(8, 16, 3, padding="same", dilation=2), (8, 9, 11)),
    "2d_same_even": (lambda: nn.Conv2d(8, 16, (4, 2), padding="same"), (8, 9, 11)),
    "2d_valid": (lambda: nn.Conv2d(8, 16, 3, padding="valid"), (8, 9, 11)),
    "3d": (lambda: nn.Conv3d(4, 8, 3, padding=1), (4, 5, 6, 7)),
}


def shifted(*shape: int) -> Tensor:
    """Values whose zero point is neither end of the range."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5


def both(model: nn.Module, x: Tensor, config: QConfig | None = None) -> tuple[Tensor, Tensor]:
    """(reference, kernel) output of the same quantized graph."""
    quantizer = calibrated(model, [((x,), {})], backend="onednn", qconfig=config)
    reference = ReferenceBackend(Backend.ONEDNN)
    return quantizer.quantize(model, backend=reference)(x), quantizer.quantize(model)(x)


def kernels(quant_model: QuantizedModule) -> list[str]:
    """Names of the operators that a quantized model calls."""
    graph = quant_model.graphs[0]
    assert isinstance(graph, QuantizedGraph)
    return [
        getattr(node.target, "_opname", str(node.target))
        for node in graph.body.graph.nodes
        if node.op == "call_function"
    ]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_with_float_output(activation: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), ACTIVATIONS[activation]()).eval()
    expected, actual = both(model, shifted(6, 5, 32))
    # Sums in another order, and oneDNN's polynomials for the functions.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_with_integer_output(activation: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), ACTIVATIONS[activation](), exact_copy(24)).eval()
    x = shifted(64, 32)
    expected, actual = both(model, x)
    quantizer = calibrated(model, [((x,), {})], backend="onednn")
    (key,) = quantizer.coverage(model).plan["2"].inputs
    step = float(quantizer.state.qparams(key, QuantSpec()).scale)
    assert float((actual - expected).abs().max()) <= 1.001 * step


@pytest.mark.thin
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # of the float module
@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "hardswish", "gelu"])
def test_conv(conv: str, activation: str) -> None:
    torch.manual_seed(0)
    build, shape = CONVS[conv]
    model = nn.Sequential(build(), ACTIVATIONS[activation]()).eval()
    expected, actual = both(model, shifted(2, *shape))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-3)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # of the float module
@pytest.mark.parametrize("conv", CONVS)
def test_conv_with_integer_output(conv: str) -> None:
    torch.manual_seed(0)
    build, shape = CONVS[conv]
    first = build()
    channels, dims = first.weight.shape[0], first.weight.dim() - 2
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    second = kinds[dims](channels, channels, 1, bias=False)
    second.weight.data.copy_(torch.eye(channels).reshape(second.weight.shape))
    model = nn.Sequential(first, nn.ReLU(), second).eval()
    x = shifted(2, *shape)
    expected, actual = both(model, x)
    quantizer = calibrated(model, [((x,), {})], backend="onednn")
    (key,) = quantizer.coverage(model).plan["2"].inputs
    step = float(quantizer.state.qparams(key, QuantSpec()).scale)
    assert float((actual - expected).abs().max()) <= 1.001 * step


def test_an_unbatched_image_is_not_for_the_kernel_but_right() -> None:
    expected, actual = both(nn.Conv2d(3, 4, 3), shifted(3, 8, 8))
    torch.testing.assert_close(actual, expected)


def test_what_the_kernel_does_not_take_is_reported_in_float() -> None:
    """Once lowered, and unless another call of it runs on the kernel."""
    model, image = nn.Conv2d(3, 4, 3), shifted(3, 8, 8)
    quantizer = calibrated(model, [((image,), {})], backend="onednn")
    why = "oneDNN's convolutions want inputs with a batch dimension"
    quant_model = quantizer.quantize(model)
    for plan in (quantizer.plan, quant_model.plan):
        assert [(site.quantized, site.reason) for site in plan.values()] == [(False, why)]
    coverage = str(quantizer.coverage(model))
    assert why in coverage
    assert "0.0%" in coverage
    assert torch.equal(quant_model(image), quantizer.quantize(model)(image))
    run(quantizer.calib(model), ((image[None],), {}))
    assert quantizer.quantize(model).plan.quantized == ("conv2d",)


def test_embedding_is_exact() -> None:
    model = nn.Embedding(50, 16)
    expected, actual = both(model, torch.randint(50, (3, 7)))
    assert torch.equal(actual, expected)
    quantizer = calibrated(model, [((torch.arange(3),), {})], backend="onednn")
    quant_model = quantizer.quantize(model)
    few = torch.arange(6, dtype=torch.int32).reshape(2, 3).mT
    assert torch.equal(quant_model(few), quant_model(few.long()))
    assert quant_model(few[:0]).shape == (0, 2, 16)
    for outside in (-1, 50):
        with pytest.raises(IndexError):
            quant_model(torch.tensor([3, outside]))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("signed", [False, True], ids=["u", "s"])
def test_other_activation_formats(bits: int, signed: bool) -> None:
    torch.manual_seed(0)
    spec = QuantSpec.of(bits=bits, signed=signed, symmetric=signed)
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))
    expected, actual = both(model, shifted(64, 32), QConfig(input=spec))
    assert sqnr(expected, actual) > 40  # flips of single codes between the two layers


SIGNED = QConfig(input=QuantSpec.of(bits=8, signed=True, symmetric=True))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # of the float module
@pytest.mark.parametrize("conv", CONVS)
def test_convolutions_of_signed_activations(conv: str) -> None:
    torch.manual_seed(0)
    build, shape = CONVS[conv]
    expected, actual = both(build(), shifted(2, *shape), SIGNED)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_signed_results_are_those_of_the_reference(kind: str) -> None:
    torch.manual_seed(0)
    layers = {
        "linear": [nn.Linear(32, 24), nn.GELU(), exact_copy(24)],
        "conv": [nn.Conv1d(32, 24, 3), nn.Hardswish(), nn.Conv1d(24, 24, 1)],
    }[kind]
    model = nn.Sequential(*layers).eval()
    if kind == "conv":
        nn.init.dirac_(layers[2].weight)
        nn.init.zeros_(layers[2].bias)
    x = shifted(16, 32) if kind == "linear" else shifted(4, 32, 20)
    expected, actual = both(model, x, SIGNED)
    quantizer = calibrated(model, [((x,), {})], backend="onednn", qconfig=SIGNED)
    (key,) = quantizer.coverage(model).plan["2"].inputs
    step = float(quantizer.state.qparams(key, SIGNED.input).scale)
    assert float((actual - expected).abs().max()) <= 1.001 * step


@pytest.mark.parametrize("bits", [6, 8])
def test_kernels_get_unsigned_codes(bits: int) -> None:
    """Signed ones take a reference kernel where there is no AMX."""
    config = QConfig(input=QuantSpec.of(bits=bits, signed=True, symmetric=True))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Linear(36, 8), nn.Linear(8, 8))
    x = shifted(2, 3, 8, 8)
    quant_model = calibrated(model, [((x,), {})], backend="onednn", qconfig=config).quantize(model)
    assert len(quant_model.plan.quantized) == 3
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func in (onednn_ops.LINEAR, onednn_ops.CONV):
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        quant_model(x)
    assert seen == [torch.uint8] * 3


def test_a_weight_format_that_the_kernels_do_not_have() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    affine = QuantSpec.of(signed=True, per_channel=True)
    quantizer = calibrated(
        model, [((shifted(4, 8),), {})], backend="onednn", overrides={"0": QConfig(weight=affine)}
    )
    quantizer.quantize(model)
    assert quantizer.plan.quantized == ("1",)
    assert "signed symmetric per-channel" in quantizer.plan["0"].reason


def test_what_is_fused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    quant_model = calibrated(model, [((shifted(4, 8),), {})], backend="onednn").quantize(model)
    assert kernels(quant_model) == ["onednn_quantize", *["onednn_linear"] * 3]


def test_a_tensor_that_is_also_needed_in_float_is_not_rounded() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return y + self.b(y)

    expected, actual = both(Residual(), shifted(32, 8))
    assert sqnr(expected, actual) > 40


def test_without_vnni_weights_have_seven_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    model = nn.Linear(64, 64)
    x = shifted(32, 64)
    quantizer = calibrated(model, [((x,), {})], backend="onednn")
    quant_model = quantizer.quantize(model)
    assert quantizer.plan["linear"].weight == QuantSpec.of(
        bits=7, signed=True, symmetric=True, per_channel=True
    )
    codes = next(v for v in quant_model.state_dict().values() if v.dtype == torch.int8)
    assert int(codes.abs().max()) <= 64
    assert sqnr(model(x), quant_model(x)) > 25


def test_packed_weights_go_with_the_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = shifted(4, 8)
    quant_model = calibrated(model, [((x,), {})], backend="onednn").quantize(model)
    quant_model(x)
    alive = len(onednn_ops.PACKED)
    del quant_model
    gc.collect()
    other = nn.Linear(4, 4)
    calibrated(other, [((shifted(2, 4),), {})], backend="onednn").quantize(other)(shifted(2, 4))
    assert len(onednn_ops.PACKED) <= alive - 2 + 1


def test_sizes_may_change_after_packing() -> None:
    model = nn.Conv2d(3, 8, 3, padding=1)
    quant_model = calibrated(model, [((shifted(2, 3, 8, 8),), {})], backend="onednn").quantize(
        model
    )
    for shape in ((1, 3, 8, 8), (5, 3, 16, 12)):
        x = shifted(*shape).clamp(-1.5, 2.5)
        assert sqnr(model(x), quant_model(x)) > 25
