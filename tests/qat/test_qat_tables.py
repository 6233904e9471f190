"""Of an embedding table, the rows that a call reads are rounded, and no others."""

from __future__ import annotations

import pytest
import torch
from qat_training import calibrated, quiet, steps
from torch import Tensor, nn

from torch_quant import (
    Distillation,
    QConfig,
    QuantError,
    QuantSpec,
    detect_nonfinite,
    switch,
)
from torch_quant.core.granularity import PerGroup
from torch_quant.qat.fake_quantize import TRAINED_FAKE_QUANTIZE

pytestmark = pytest.mark.usefixtures("grad")


class Tagger(nn.Module):
    """Reads a table, whose weight may be that of the last layer."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 16, padding_idx=3)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50 if tied else 20, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.table(ids)).relu())


IDS = torch.tensor([[1, 3, 7, 7], [2, 2, 49, 3]])
GROUPS = QConfig(weight=QuantSpec.of("int4", granularity=PerGroup(8)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weight", ["int8", "int4 in groups"])
def test_it_computes_what_is_deployed(tied: bool, weight: str) -> None:
    options = {} if weight == "int8" else {"qconfig": GROUPS}
    quantizer, model, inputs = calibrated(Tagger(tied).eval(), IDS, **options)
    before = quiet(quantizer.quantize(model), inputs)
    qat_model = quantizer.qat(model, edge_bits=None)
    assert torch.equal(quiet(qat_model, inputs), before)
    steps(quantizer, qat_model, inputs)
    after = quiet(qat_model, inputs)
    assert not torch.equal(after, before)
    assert torch.equal(quiet(quantizer.quantize(qat_model), inputs), after)


def test_rows_that_are_read_are_rounded_alone() -> None:
    quantizer, model, _ = calibrated(Tagger().eval(), IDS)
    qat_model, saved = quantizer.qat(model), list[tuple[int, ...]]()

    def seen(x: Tensor) -> Tensor:
        saved.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda x: x):
        qat_model(IDS)
    assert (2, 4, 16) in saved  # the rows
    assert (16, 16) in saved  # another weight, rounded as a whole
    assert (50, 16) not in saved


def test_every_mode() -> None:
    quantizer, model, _ = calibrated(Tagger().eval(), IDS)
    floating = quiet(model, (IDS,))
    qat_model = quantizer.qat(model).train()
    switch(qat_model, fake_quantize=False)
    assert torch.equal(qat_model(IDS), floating)
    switch(qat_model, fake_quantize=True, observe=True)
    with torch.no_grad():
        model.table.weight.mul_(2.0)
        before = qat_model.table.weight_scale.clone()
        qat_model(IDS)
    used = torch.arange(50) != 3  # padding is all zeros
    torch.testing.assert_close(qat_model.table.weight_scale[used], before[used] * 2.0)
    switch(qat_model, observe=False)
    distillation = Distillation(qat_model, hidden=["table"])
    distillation.loss(IDS)
    assert 0.0 < distillation.distances["table"] < 1e-3  # of rounding to 8 bits
    with torch.no_grad():
        model.table.weight[7] = float("nan")
    with detect_nonfinite(qat_model), pytest.raises(QuantError, match="table: the weight holds"):
        qat_model(IDS)


def test_gradients_are_those_of_a_whole_table() -> None:
    """Against a rounding of the whole table, whose rows are read then."""
    torch.manual_seed(1)
    table, scale = torch.randn(50, 16), torch.rand(50, 1) * 0.3 + 0.05
    zero, how = torch.zeros(50, 1, dtype=torch.int32), ("int4", "float32", "weight", "lsq", "")
    found = []
    for rows in (True, False):
        leaves = table.clone().requires_grad_(), scale.clone().requires_grad_()
        if rows:
            y = TRAINED_FAKE_QUANTIZE(*leaves, zero, *how, None, IDS, 3)
        else:
            whole = TRAINED_FAKE_QUANTIZE(*leaves, zero, *how)
            y = torch.ops.aten.embedding(whole, IDS, 3)
        (y * torch.linspace(-1, 2, 128).reshape(2, 4, 16)).sum().backward()
        found.append((y.detach(), *(leaf.grad for leaf in leaves)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    # Rows that are read twice: sums in another order.
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-5, atol=1e-6)
    assert not found[0][1][3].any()  # padding
    assert found[0][2].count_nonzero() == 4
