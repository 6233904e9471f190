"""IPEX against the reference, op by op, and that it fuses what the plan has in int8."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flows import calibrated
from models import exact_copy
from processor import needs_bfloat16
from torch import Tensor, nn

from torch_quant import Backend, QConfig, QuantSpec, export_torchscript, recipes, sqnr
from torch_quant.backends import IPEXBackend, ReferenceBackend

pytestmark = pytest.mark.skipif(
    Backend.IPEX.unavailable() is not None, reason=f"Backend.IPEX: {Backend.IPEX.unavailable()}"
)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "hardtanh": nn.Hardtanh,
    "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh"), "silu": nn.SiLU,
    "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "hardswish": nn.Hardswish, "elu": nn.ELU,
    "hardsigmoid": nn.Hardsigmoid, "mish": nn.Mish, "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "softplus": nn.Softplus,
}  # fmt: skip

CONVS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(8, 16, 3, padding=1), (8, 20)),
    "2d": (lambda: nn.Conv2d(8, 16, 3, padding=1), (8, 9, 11)),
    "2d_grouped": (lambda: nn.Conv2d(8, 16, 3, groups=4, stride=2), (8, 9, 11)),
    "2d_depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1), (8, 9, 11)),
    "2d_same": (lambda: nn.Conv2d(8, 16, 3, padding="same", dilation=2), (8, 9, 11)),
    "2d_same_even": (lambda: nn.Conv2d(8, 16, (4, 2), padding="same"), (8, 9, 11)),
    "2d_valid": (lambda: nn.Conv2d(8, 16, 3, padding="valid"), (8, 9, 11)),
    "3d": (lambda: nn.Conv3d(4, 8, 3, padding=1), (4, 5, 6, 7)),
    "2d_transposed": (lambda: nn.ConvTranspose2d(8, 16, 3, stride=2), (8, 5, 6)),
    "3d_transposed": (lambda: nn.ConvTranspose3d(4, 8, 3), (4, 4, 5, 6)),
}


def shifted(*shape: int) -> Tensor:
    """Values whose zero point is neither end of the range."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5


def both(model: nn.Module, *inputs: Tensor, config: QConfig | None = None) -> tuple[Tensor, Tensor]:
    """(reference, IPEX) output of the same quantized graph; every product must be fused."""
    quantizer = calibrated(model, [(inputs, {})], backend="ipex", qconfig=config)
    reference = ReferenceBackend(Backend.IPEX)
    expected = quantizer.quantize(model, backend=reference)(*inputs)
    quant_model = quantizer.quantize(model)
    actual = quant_model(*inputs)
    report = IPEXBackend().verify(quant_model, inputs)
    assert report.complete, str(report)
    return expected, actual


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear(activation: str) -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(32, 24), ACTIVATIONS[activation]()).eval()
    x = shifted(6, 5, 32)
    expected, actual = both(first, x)
    # Sums in another order, and oneDNN's polynomials for the functions.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)

    model = nn.Sequential(*first, exact_copy(24))
    expected, actual = both(model, x)
    quantizer = calibrated(model, [((x,), {})], backend="ipex")
    (key,) = quantizer.coverage(model).plan["2"].inputs
    step = float(quantizer.state.qparams(key, QuantSpec()).scale)
    assert float((actual - expected).abs().max()) <= 1.001 * step


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # of the float module
@pytest.mark.parametrize("conv", CONVS)
def test_conv(conv: str) -> None:
    torch.manual_seed(0)
    build, shape = CONVS[conv]
    for activation in ("none", "relu", "relu6", "hardswish"):
        model = nn.Sequential(build(), ACTIVATIONS[activation]()).eval()
        expected, actual = both(model, shifted(2, *shape))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-3)


def test_an_unbatched_image() -> None:
    expected, actual = both(nn.Conv2d(3, 4, 3), shifted(3, 8, 8))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_pools() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.AvgPool2d(2),
        nn.Conv2d(8, 4, 1),
    ).eval()  # fmt: skip
    expected, actual = both(model, shifted(2, 3, 20, 20))
    assert sqnr(expected, actual) > 40  # flips of single codes between the layers


def test_linear_and_batch_norm_are_one() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(24)
    norm.running_var.fill_(0.3)
    norm.running_mean.copy_(torch.randn(24))
    expected, actual = both(nn.Sequential(nn.Linear(32, 24), norm).eval(), shifted(6, 32))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_signed_activations_of_a_users_observer() -> None:
    config = QConfig(input=QuantSpec.of(signed=True, symmetric=True), observer="histogram")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))
    expected, actual = both(model, shifted(64, 32), config=config)
    assert sqnr(expected, actual) > 40


def test_formats_it_has_no_kernel_for() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    four = QConfig(input=QuantSpec.of(bits=4))
    quantizer = calibrated(model, [((shifted(4, 8),), {})], backend="ipex", overrides={"0": four})
    quantizer.quantize(model)
    assert "full range" in quantizer.plan["0"].reason
    assert quantizer.plan.quantized == ("1",)


def test_embedding_is_exact() -> None:
    model = nn.Embedding(50, 16)
    x = torch.randint(50, (3, 7))
    expected, actual = both(model, x)
    assert torch.equal(actual, expected)


class Attention(nn.Module):
    """Heads of one projection each, a mask that may hide whole rows."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.causal = causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], 4, 8).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(x.shape))


def _mask(kind: str, batch: int, length: int) -> Tensor:
    keep = torch.rand(batch, 1, length, length, generator=torch.Generator().manual_seed(1)) > 0.3
    keep[0, :, 2] = False  # a row that sees nothing
    if kind == "keys":
        keep = torch.arange(length).expand(batch, 1, 1, -1) < length - 2
    if kind == "shared":
        keep = keep[-1, 0]
    if kind == "heads":
        keep = keep.expand(-1, 4, -1, -1)
    return torch.zeros(keep.shape).masked_fill(~keep, -torch.inf) if kind == "float" else keep


@pytest.mark.parametrize("kind", ["rows", "keys", "shared", "heads", "float"])
def test_attention_with_a_mask(kind: str) -> None:
    torch.manual_seed(0)
    x = shifted(3, 9, 32)
    expected, actual = both(Attention().eval(), x, _mask(kind, 3, 9))
    assert sqnr(expected, actual) > 35


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal: bool) -> None:
    torch.manual_seed(0)
    expected, actual = both(Attention(causal).eval(), shifted(3, 9, 32))
    assert sqnr(expected, actual) > 35


def test_no_row_of_attention_sees_what_is_hidden() -> None:
    torch.manual_seed(0)
    model = Attention().eval()
    x, mask = shifted(2, 6, 32), _mask("rows", 2, 6)
    quant_model = calibrated(model, [((x, mask), {})], backend="ipex").quantize(model)
    float_zeros = model.out.bias  # of a row that sees nothing, all values are 0
    assert sqnr(float_zeros, quant_model(x, mask)[0, 2]) > 25


_LOADER = """
import sys, torch, intel_extension_for_pytorch
model = torch.jit.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
with torch.no_grad():
    for _ in range(3):
        actual = model(x)
assert torch.equal(actual, expected), (actual - expected).abs().max()
assert "ipex::LlgaFusionGroup" in str(model.graph_for(x))
"""


def test_a_file_needs_ipex_only_and_gives_the_same_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)).eval()
    x = shifted(5, 256)
    quant_model = calibrated(model, [((x,), {})], backend="ipex").quantize(model)
    traced = export_torchscript(quant_model, shifted(2, 256), tmp_path / "model.pt")
    expected = quant_model(x)
    assert torch.equal(traced(x), expected)
    report = IPEXBackend().verify(traced, (x,))
    assert report.complete
    assert report.int8 == {"linear": 2}
    torch.save((x, expected), tmp_path / "case.pt")
    command = [sys.executable, "-W", "ignore", "-c", _LOADER]
    command += [str(tmp_path / name) for name in ("model.pt", "case.pt")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "model.pt").stat().st_size < 200_000  # 131072 weights, a byte each


def test_example_inputs_give_the_compiled_module_at_once() -> None:
    model = nn.Linear(8, 8)
    quantizer = calibrated(model, [((shifted(4, 8),), {})], backend="ipex")
    quant_model = quantizer.quantize(model, example_inputs=shifted(2, 8))
    assert quant_model.graphs[0].compiled is not None
    assert quantizer.quantize(model).graphs[0].compiled is None


def test_verify_names_what_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    x = shifted(4, 8)
    quantizer = calibrated(model, [((x,), {})], backend="ipex")
    quant_model = quantizer.quantize(model, example_inputs=x)
    with torch.no_grad():
        traced = torch.jit.trace(quant_model, x)  # not frozen: nothing is fused
    report = IPEXBackend().verify(traced, (x,), plan=quantizer.plan)
    assert not report.complete
    assert "linear" in str(report)


@needs_bfloat16
def test_bfloat16_for_what_stays_in_float() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)).eval()
    x = shifted(16, 32)
    backend = IPEXBackend(bfloat16=True)
    quantizer = calibrated(model, [((x,), {})], backend=backend)
    quant_model = quantizer.quantize(model)
    assert quant_model(x).dtype == torch.float32
    assert sqnr(model(x), quant_model(x)) > 25
    assert backend.verify(quant_model, x).complete
    script = quant_model.graphs[0].compiled.script
    assert "BFloat16" in str(script.graph_for(x))


def groups(quant_model: nn.Module, *inputs: Tensor) -> list[list[str]]:
    """Names of the operators of each fused partition."""
    script = quant_model.graphs[0].compiled.script
    return [
        [n.kind().partition("::")[2] for n in node.g("Subgraph").nodes() if "aten" in n.kind()]
        for node in script.graph_for(*inputs).nodes()
        if node.kind() == "ipex::LlgaFusionGroup"
    ]


def test_what_is_fused_behind_a_product() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU6(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    x = shifted(4, 8)
    product = ["dequantize", "dequantize", "linear"]
    quantizer = calibrated(model, [((x,), {})], backend="ipex", qconfig=recipes.fast())
    assert groups(quantizer.quantize(model, example_inputs=x), x) == [
        [*product, "hardtanh", "quantize_per_tensor"],
        [*product, "gelu", "quantize_per_tensor"],
        product,
    ]


def test_what_is_fused_in_attention() -> None:
    torch.manual_seed(0)
    model, inputs = Attention().eval(), (shifted(3, 9, 32), _mask("rows", 3, 9))
    quantizer = calibrated(model, [(inputs, {})], backend="ipex")
    found = groups(quantizer.quantize(model, example_inputs=inputs), *inputs)
    product = ["dequantize", "dequantize", "matmul"]
    assert [*product, "mul", "add"] in found
    assert ["softmax", "quantize_per_tensor"] in found
    assert [*product, "mul"] in found  # by zero for rows that see nothing
    assert ["dequantize", "dequantize", "linear", "quantize_per_tensor"] in found
