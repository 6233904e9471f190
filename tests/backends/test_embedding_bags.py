"""Bags of embeddings: int8 rows, reduced as PyTorch reduces float ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flows import calibrated
from torch import Tensor, nn

from torch_quant import Backend, QConfig, QuantSpec, sqnr
from torch_quant.backends import IPEXBackend, ReferenceBackend, available_backends

BACKENDS = [b.name for b in available_backends() if "embedding_bag" in b.kernels().ops]
needs_ipex = pytest.mark.skipif(
    Backend.IPEX.unavailable() is not None, reason=f"Backend.IPEX: {Backend.IPEX.unavailable()}"
)

IDS = torch.tensor([5, 1, 2, 3, 3, 7, 2, 0, 9, 4])
EMPTY = torch.tensor([0, 0, 3, 9, 10])
"""Bags of 0, 3, 6, 1 and 0 rows."""
FORMS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "rows": ({"mode": "sum"}, (IDS.reshape(2, 5),)),
    "mean": ({"mode": "mean"}, (IDS, EMPTY)),
    "max": ({"mode": "max"}, (IDS, EMPTY)),
    "offsets": ({"mode": "sum"}, (IDS, EMPTY)),
    "last_offset": ({"mode": "sum", "include_last_offset": True}, (IDS, EMPTY)),
    "padding": ({"mode": "mean", "padding_idx": -8}, (IDS, EMPTY)),
    "padded_sum": ({"mode": "sum", "padding_idx": 3}, (IDS, EMPTY)),
    "weighted": ({"mode": "sum"}, (IDS, EMPTY, torch.linspace(-1, 2, 10))),
    "no_ids": ({"mode": "sum"}, (IDS[:0], torch.tensor([0, 0]))),
    "int32": ({"mode": "sum"}, (IDS.int(), EMPTY.int())),
}


def bags(std: float = 1.0, **options: Any) -> nn.EmbeddingBag:
    """A table whose rows differ in size."""
    torch.manual_seed(0)
    model = nn.EmbeddingBag(10, 16, **options).eval()
    with torch.no_grad():
        model.weight.mul_(std * torch.linspace(0.5, 1.5, 10)[:, None])
    return model


def data(inputs: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What a bag is calibrated with: the inputs, and others of their kind where they are none."""
    return [(inputs, {})] if len(inputs[0]) else [((IDS, EMPTY), {})]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_numbers_of_the_simulation(form: str, backend: str) -> None:
    options, inputs = FORMS[form]
    model = bags(**options)
    quantizer = calibrated(model, data(inputs), backend=backend)
    quant_model = quantizer.quantize(model)
    expected = quantizer.quantize(model, backend=ReferenceBackend(Backend.get(backend)))(*inputs)
    for _ in range(3):
        actual = quant_model(*inputs)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert sqnr(model(*inputs), actual) > 30 or not actual.any()


def test_the_reference_reads_an_int8_table_by_rows() -> None:
    model = bags(mode="sum")
    quant_model = calibrated(model, [((IDS[:, None],), {})], backend="reference").quantize(model)
    step = model.weight.abs().amax(1, keepdim=True) / 127.5  # symmetric, -128 to 127
    table = [x for x in quant_model.buffers() if x.dtype == torch.int8]
    assert [x.shape for x in table] == [(10, 16)]
    gap = (quant_model(IDS[:, None]) - model.weight[IDS]).abs()
    assert bool((gap <= 0.51 * step[IDS]).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_table_is_stored_as_int8(backend: str) -> None:
    model = nn.EmbeddingBag(2000, 64).eval()
    quantizer = calibrated(model, [((IDS, EMPTY), {})], backend=backend)
    size = sum(
        x.numel() * x.element_size() for x in quantizer.quantize(model).state_dict().values()
    )
    assert size < 0.3 * 4 * model.weight.numel()


def test_a_bag_whose_other_results_are_read_stays_in_float() -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Parameter(torch.randn(10, 4)), nn.Linear(4, 4)

        def forward(self, ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
            found = torch.ops.aten.embedding_bag.default(self.table, ids, offsets, False, 1)
            return self.head(found[0]), found[2]

    model = Sizes()
    quantizer = calibrated(model, [((IDS, EMPTY), {})], backend="reference")
    outputs = quantizer.quantize(model)(IDS, EMPTY)
    assert torch.equal(outputs[1], model(IDS, EMPTY)[1])
    assert quantizer.plan.quantized == ("head",)
    reasons = {site.op: site.reason for site in quantizer.plan.values()}
    assert reasons["embedding_bag"] == "more of its results than the bags are read"


@needs_ipex
def test_ipex_sums_on_its_kernel_and_says_what_it_does_not() -> None:
    for form, fused in {"offsets": True, "rows": True, "mean": False, "weighted": False}.items():
        options, inputs = FORMS[form]
        model = bags(**options)
        quant_model = calibrated(model, data(inputs), backend="ipex").quantize(model)
        report = IPEXBackend().verify(quant_model, inputs)
        assert report.expected == {"embedding_bag": 1}
        assert report.complete == fused, str(report)
        assert report.int8.get("embedding_bag", 0) == fused
        assert fused or "only sums" in str(report)


@needs_ipex
@pytest.mark.parametrize("std", [1.0, 1e-3], ids=["finer", "tiny"])
def test_bags_of_one_row_or_none_on_a_grid_as_fine_as_the_tables(std: float) -> None:
    """IPEX's kernel copies the codes of the first row into them, whatever their scale."""
    model = bags(std, mode="sum")
    with torch.no_grad():
        model.weight[8] *= 20  # never read: the table's steps are larger than the result's
    one = torch.arange(7)
    quantizer = calibrated(model, [((one, one), {})], backend="ipex")
    quant_model = quantizer.quantize(model)
    inputs = (one, torch.tensor([0, 1, 2, 3, 3, 4, 5, 6]))
    expected = quantizer.quantize(model, backend=ReferenceBackend(Backend.IPEX))(*inputs)
    for _ in range(3):
        assert sqnr(expected, quant_model(*inputs)) > 60
    assert not expected[3].any()


@needs_ipex
def test_ipex_wants_one_symmetric_scale() -> None:
    model = nn.Sequential(bags(mode="sum"), nn.Linear(16, 4)).eval()
    rows = QConfig(weight=QuantSpec.of(signed=True, symmetric=True, per_channel=True))
    quantizer = calibrated(model, [((IDS[:, None],), {})], backend="ipex", qconfig=rows)
    quantizer.quantize(model)
    assert "IPEX sums bags of s8 symmetric per-tensor" in quantizer.plan["0"].reason
    assert quantizer.plan.quantized == ("1",)


@pytest.mark.parametrize(
    "backend", [b.name for b in available_backends() if "embedding_bag" in b.kernels().ops]
)
def test_bags_that_are_written_to(backend: str) -> None:
    class Rectified(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.bags = nn.EmbeddingBag(50, 16, mode="sum")

        def forward(self, x: Tensor) -> Tensor:
            y = self.bags(x)
            y[:, 0] = 0.0
            return y.relu_() + 1.0

    model = Rectified().eval()
    x = torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(0))
    quantizer = calibrated(model, [((x,), {})], backend=backend)
    assert sqnr(model(x), quantizer.quantize(model)(x)) >= 30
