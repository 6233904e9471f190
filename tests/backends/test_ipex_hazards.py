"""Graphs for which IPEX, given quantize/dequantize pairs as they come, is wrong, fails or hangs.

Each was seen to happen with IPEX 2.8.0; the numbers must be the reference's all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from flows import calibrated
from processor import needs_vnni
from torch import Tensor, nn

from torch_quant import Backend, recipes, sqnr
from torch_quant.backends import IPEXBackend, ReferenceBackend

pytestmark = [
    pytest.mark.skipif(
        Backend.IPEX.unavailable() is not None, reason=f"Backend.IPEX: {Backend.IPEX.unavailable()}"
    ),
    pytest.mark.timeout(60),  # some never end
]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3


class Net(nn.Module):
    """Two linear layers, a parameter of some shape, and what to do with them."""

    def __init__(
        self, function: Callable[..., Tensor | tuple[Tensor, ...]], *shape: int, features: int = 16
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(features, features), nn.Linear(features, features)
        self.p = nn.Parameter(numbers(*shape, seed=1))
        self.function = function

    def forward(self, *x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self, *x)


def agree(
    model: nn.Module, *inputs: Tensor, least: float = 60.0, backend: Backend | None = None
) -> None:
    """IPEX's output is the reference's, at the third call as at the first; inputs stay as is.

    ``least`` dB: the same codes give over 100, and a flipped code between layers some 50.
    """
    model.eval()
    quantizer = calibrated(model, [(inputs, {})], backend=backend or "ipex")
    reference = quantizer.quantize(model, backend=ReferenceBackend(Backend.IPEX))
    expected = reference(*inputs)
    quant_model = quantizer.quantize(model)
    given = [x.clone() for x in inputs]
    for _ in range(3):
        assert sqnr(expected, quant_model(*given)) > least
        for x, original in zip(given, inputs, strict=True):
            assert torch.equal(x, original)


def test_1_a_residual_that_is_the_layers_own_quantized_input() -> None:
    agree(Net(lambda m, x: m.b(m.a(x) + x)), numbers(4, 6, 16), least=40)
    agree(Net(lambda m, x: m.b((y := m.a(x).relu()) + m.a(y))), numbers(4, 6, 16), least=40)


def test_2_a_quantized_sum_whose_consumer_is_not_fused() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return (m.b(y) + y).unsqueeze(1) @ m.p  # a product with broadcasting stays unfused

    agree(Net(run, 3, 16, 8), numbers(4, 6, 16), least=40)


def test_3_sums_do_not_overwrite_what_is_read_later() -> None:
    x = numbers(4, 6, 16)
    agree(Net(lambda m, x, r: m.a(x) + r), x, numbers(4, 6, 16, seed=2))
    agree(Net(lambda m, x: m.a(x) + m.p, 4, 6, 16), x)  # a parameter

    def view_read_later(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        r = x.tanh()
        view = r.view(-1, 16)
        return m.a(x) + r, view * 2

    def view_added(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        r = x.tanh()
        return m.a(x) + r.transpose(0, 1).transpose(0, 1), r * 2

    def part_added(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        r = torch.cat([x, x]).tanh()
        first, _ = r.split(4)
        return m.a(x) + first, r * 2

    agree(Net(view_read_later), x)
    agree(Net(view_added), x)
    agree(Net(part_added), x)


@needs_vnni
def test_4_a_product_of_a_tensor_with_itself() -> None:
    agree(Net(lambda m, x: x @ x), numbers(3, 8, 8))
    agree(Net(lambda m, x: x @ x.transpose(-1, -2)), numbers(3, 2, 8, 8))
    agree(Net(lambda m, x: m.a(x) * m.a(x)), numbers(4, 16))


def test_5_pools_without_a_stride() -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.avg_pool2d(self.b(F.max_pool2d(self.a(x).relu(), 2)), 2))

    torch.manual_seed(0)
    agree(Pools(), numbers(2, 3, 14, 14), least=40)


def test_6_the_tanh_form_of_gelu() -> None:
    model = Net(lambda m, x: F.gelu(m.a(x), approximate="tanh"))
    agree(model, numbers(4, 6, 16), least=90)  # 75 dB as the exact form


def test_7_another_rank_after_tracing_and_parameters_that_want_gradients() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).requires_grad_(True)
    shapes = [(5, 16), (2, 5, 16), (2, 3, 5, 16)]
    quantizer = calibrated(model, [((numbers(*shape),), {}) for shape in shapes], backend="ipex")
    with torch.enable_grad():
        quant_model = quantizer.quantize(model)
        for shape in shapes:
            for size in (7, 3):
                x = numbers(size, *shape[1:])
                y = quant_model(x)
                assert not y.requires_grad
                assert sqnr(model(x), y) > 25


@pytest.mark.parametrize(
    "shape",
    [(), (1,), (16,), (6, 16), (6, 1), (1, 6, 1), (4, 1, 1), (4, 6, 1), (4, 1, 16), (1, 1, 1)],
    ids=str,
)
def test_8_broadcasts_behind_a_product(shape: tuple[int, ...]) -> None:
    agree(Net(lambda m, x: m.a(x) * m.p.tanh() + m.p, *shape), numbers(4, 6, 16))


def test_9_scalars_with_a_factor() -> None:
    agree(Net(lambda m, x: torch.add(m.a(x), 3.0, alpha=2)), numbers(4, 16))
    agree(Net(lambda m, x, r: torch.add(m.a(x), r, alpha=2)), numbers(4, 16), numbers(4, 16))
    agree(Net(lambda m, x, r: torch.add(r, m.a(x), alpha=2)), numbers(4, 16), numbers(4, 16))


def test_10_products_of_constants() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        positions = m.a(m.p)
        return (m.b(x) @ positions.t()) / math.sqrt(16) + positions.sum()

    agree(Net(run, 9, 16), numbers(4, 6, 16))


@needs_vnni
def test_11_stacks_along_another_dimension() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        q, k = (y.view(5, 6, 8).transpose(0, 1) for y in (m.a(x), m.b(x)))
        return torch.bmm(q, k.transpose(1, 2))

    agree(Net(run), numbers(5, 3, 16), least=40)


def test_12_a_weight_under_two_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(30, 16)
            self.head = nn.Linear(16, 30, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    torch.manual_seed(0)
    agree(Tied(), torch.arange(24).view(4, 6))


class Blocks(nn.Module):
    """Convolutions of 8 channels, and what to do with them."""

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.function = function

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self, x)


def test_1_and_2_shortcuts_of_convolutions() -> None:
    x = numbers(2, 8, 9, 9)

    def own(m: Blocks, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return m.c((m.b(y) + y).relu())

    def around_two(m: Blocks, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        z = (m.b(m.a(y).relu()) + y).relu()
        return m.c((m.c(m.a(z).relu()) + z).relu())

    def read_otherwise(m: Blocks, x: Tensor) -> tuple[Tensor, ...]:
        y = m.a(x).relu()
        z = (m.b(m.a(y).relu()) + y).relu()
        return m.c(z), z.mean((2, 3)), y * 2

    def pooled(m: Blocks, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return m.c(F.max_pool2d((m.b(m.a(y).relu()) + y).relu(), 2))

    for function in (own, around_two, read_otherwise, pooled):
        # Within the error of quantization: IPEX adds codes where the reference adds floats.
        for shortcuts, least in ((True, 32), (None, 32), (False, 40)):
            backend = IPEXBackend(int8_shortcuts=shortcuts)
            agree(Blocks(function), x, least=least, backend=backend)


def test_13_a_result_that_is_written_to_through_a_view() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y.view(y.shape[0], -1)[:, ::2] = 0.0
        return y * 2

    model = Net(run).eval()
    x = numbers(4, 6, 16)
    agree(model, x)
    quant_model = calibrated(model, [((x,), {})], backend="ipex").quantize(model, example_inputs=x)
    report = IPEXBackend().verify(quant_model, x)
    assert "through a view" in str(report)
    assert not report.complete


class Residual(nn.Module):
    """Two residual layers on what ``start`` makes of ``(batch, features, length)``."""

    def __init__(self, start: Callable[[Residual, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv1d(16, 16, 3, padding=1), nn.LayerNorm(16)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(self, x)
        x = x + self.a(self.norm(x))
        return x + self.b(self.norm(x))


@pytest.mark.parametrize(
    "start",
    [
        lambda m, x: m.conv(x).transpose(1, 2),
        lambda m, x: x.transpose(1, 2),
        lambda m, x: x.transpose(1, 2) * 2,
    ],
    ids=["a product", "the input", "an operator that keeps the order"],
)
def test_14_sums_into_another_order_when_sizes_come_back(
    start: Callable[[Residual, Tensor], Tensor],
) -> None:
    model = Residual(start).eval()
    quantizer = calibrated(
        model, [((numbers(4, 16, 32),), {})], backend="ipex", qconfig=recipes.fast()
    )
    reference = quantizer.quantize(model, backend=ReferenceBackend(Backend.IPEX))
    quant_model = quantizer.quantize(model)
    for turn, batch in enumerate((2, 2, 24, 3, 2, 2, 3, 24, 2)):
        x = numbers(batch, 16, 32, seed=turn)
        assert sqnr(reference(x), quant_model(x)) > 60


@pytest.mark.parametrize("shape", [[16], [6, 16]])
def test_15_layer_norms_without_a_weight(shape: list[int]) -> None:
    agree(Net(lambda m, x: m.b(F.layer_norm(m.a(x), shape))), numbers(4, 6, 16), least=40)
