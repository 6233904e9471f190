"""Multiply-accumulates of every operator that multiplies, in a graph and in plain Python code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flows import calibrated
from models import normal, seeded
from thinning import third
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torch_quant import Quantizer
from torch_quant.graph.macs import GLUE, MacCounter
from torch_quant.report.coverage import Coverage

Compute = Callable[["Head", Tensor], Tensor]


class Head(nn.Module):
    """A linear layer that is a site, then whatever multiplies ``[batch, 8, 16]``.

    Args:
        compute: what follows.
        make: makes the module that it calls.
        split: run it in Python, which a look at the data forces.
    """

    def __init__(self, compute: Compute, make: Callable[[], nn.Module], split: bool) -> None:
        super().__init__()
        self.site, self.part = nn.Linear(16, 16), make()
        self.matrix = nn.Parameter(torch.randn(16, 16))
        self.compute, self.split = compute, split

    def forward(self, x: Tensor) -> Tensor:
        y = self.site(x)
        if self.split and y.sum().item() > 1e9:
            y = -y
        return self.compute(self, y)


def last(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def computed(y: Tensor) -> Tensor:
    """A weight that depends on the input."""
    return y[0, :, :8].contiguous() * 2.0


def taps(y: Tensor) -> Tensor:
    """The kernel of a convolution, ``[3, 16, 8]``."""
    return torch.stack([y[0, :, :8], y[0, :, 4:12], y[0, :, 8:]]).repeat(1, 2, 1)


ROWS = 8
CASES: dict[str, tuple[Compute, Callable[[], nn.Module], int | None]] = {
    "gru": (lambda m, y: last(m.part(y)), lambda: nn.GRU(16, 5, 2), ROWS * 3 * (105 + 50)),
    "rnn": (lambda m, y: last(m.part(y)), lambda: nn.RNN(16, 5), ROWS * (80 + 25)),
    "relu rnn": (
        lambda m, y: last(m.part(y)),
        lambda: nn.RNN(16, 5, nonlinearity="relu", bidirectional=True),
        ROWS * 2 * (80 + 25),
    ),
    "lstm with projections": (
        lambda m, y: last(m.part(y)), lambda: nn.LSTM(16, 6, proj_size=4), ROWS * (24 * 20 + 24)
    ),
    "lstm cell": (
        lambda m, y: last(m.part(y[:, 0])), lambda: nn.LSTMCell(16, 6), 24 * 16 + 24 * 6
    ),
    "gru cell": (lambda m, y: m.part(y[:, 0]), lambda: nn.GRUCell(16, 6), 18 * 16 + 18 * 6),
    "rnn cell": (lambda m, y: m.part(y[:, 0]), lambda: nn.RNNCell(16, 6), 6 * 16 + 6 * 6),
    "bilinear": (lambda m, y: m.part(y, y), lambda: nn.Bilinear(16, 16, 3), ROWS * 3 * 256),
    "einsum": (lambda m, y: torch.einsum("bij,jk->bik", y, m.matrix), nn.Identity, None),
    "einsum of three": (
        lambda m, y: torch.einsum("bij,jk,bil->bkl", y, m.matrix, y), nn.Identity, None
    ),
    "baddbmm": (
        lambda m, y: torch.baddbmm(y @ y.mT, y, y.mT), nn.Identity, None
    ),
    "addmm": (lambda m, y: torch.addmm(y[0] @ y[0].T, y[0], y[0].T), nn.Identity, None),
    "addbmm": (
        lambda m, y: torch.addbmm(y[0] @ y[0].T, y, y.mT), nn.Identity, 2 * 8 * 8 * 16
    ),
    "mv": (lambda m, y: torch.mv(y[0], y[0, 0]), nn.Identity, 8 * 16),
    "dot": (lambda m, y: torch.dot(y[0, 0], y[0, 1])[None], nn.Identity, 16),
    "tensordot": (lambda m, y: torch.tensordot(y, m.matrix, 1), nn.Identity, None),
    "inner": (lambda m, y: torch.inner(y, m.matrix), nn.Identity, None),
    "multi_dot": (
        lambda m, y: torch.linalg.multi_dot([y[0], m.matrix, y[0].T]), nn.Identity, None
    ),
    "linear, weight computed": (
        lambda m, y: functional.linear(y[..., :8], computed(y)), nn.Identity, None
    ),
    "conv, weight computed": (
        lambda m, y: functional.conv1d(y, computed(y)[:, :, None]), nn.Identity, None
    ),
    "transposed conv, weight computed": (
        lambda m, y: functional.conv_transpose1d(y, computed(y)[:, :, None]), nn.Identity, None
    ),
    "convolution": (
        lambda m, y: torch.convolution(
            y, computed(y)[:, :, None], None, [1], [0], [1], False, [0], 1
        ),
        nn.Identity,
        None,
    ),
    "conv_tbc": (
        lambda m, y: torch.conv_tbc(y.mT.contiguous().mT.transpose(0, 1), taps(y), y[0, 0, :8]),
        nn.Identity,
        6 * 1 * 8 * 3 * 16,
    ),
    "attention": (
        lambda m, y: functional.scaled_dot_product_attention(y, y, y), nn.Identity, None
    ),
    "attention with heads": (
        lambda m, y: last(m.part(y, y, y)), lambda: nn.MultiheadAttention(16, 4), None
    ),
    "distances": (
        lambda m, y: torch.cdist(y, y, compute_mode="use_mm_for_euclid_dist"), nn.Identity, None
    ),
}  # fmt: skip
"""What multiplies, the module it calls, and by formula where PyTorch's counter does not know it."""


def counted(model: nn.Module, *inputs: Tensor) -> int:
    """By PyTorch's counter; attention, of which it does not know this form, as its products."""
    model.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return int(counter.get_total_flops()) // 2


def covered(model: nn.Module, *inputs: Tensor) -> Coverage:
    quantizer = calibrated(model, [(inputs, {})], backend="reference")
    return quantizer.coverage(model)


@pytest.mark.thin
@pytest.mark.parametrize("split", [False, True], ids=["in a graph", "in Python"])
@pytest.mark.parametrize("name", CASES)
def test_everything_that_multiplies_counts(name: str, split: bool) -> None:
    compute, make, extra = CASES[name]
    model, x = seeded(lambda: Head(compute, make, split)), normal(1, 8, 16)
    report = covered(model, x)
    site = ROWS * 16 * 16
    expected = counted(model, x) if extra is None else site + extra
    assert report.plan.macs == expected
    assert report.plan["site"].macs == site
    int8 = sum(report.plan[each].macs for each in report.plan.quantized)
    assert report.share == int8 / expected
    assert "site" in report.plan.quantized
    assert all(op.reason and op.macs for op in report.float_ops)
    assert set(report.reasons) >= {op.name for op in report.float_ops}
    total = sum(float(str(row["share of MACs"]).rstrip("%")) for row in report.by_op())
    assert total == pytest.approx(100.0, abs=0.11 * len(report.by_op()))


def test_the_cell_beside_a_linear_layer() -> None:
    compute, make, _ = CASES["lstm cell"]
    model = seeded(
        lambda: Head(lambda m, y: last(m.part(y[:, 0])), lambda: nn.LSTMCell(16, 96), False)
    )
    assert compute is not None
    assert make is not None
    quantizer = calibrated(model, [((normal(1, 1, 16),), {})], backend="reference")
    report = quantizer.coverage(model)
    assert report.share == 1.0
    assert "100.0% of the multiply-accumulates in int8, 2 of 2 sites" in str(report)
    assert report.plan.summary in quantizer.quantize(model).description
    assert report.plan.summary in repr(quantizer)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_python_code_and_graphs_count_the_same_call(batch: int) -> None:
    """An example of one sample may be repeated to be captured."""
    model = seeded(lambda: Head(lambda m, y: m.part(y) @ m.matrix, lambda: nn.Linear(16, 16), True))
    x = normal(batch, 8, 16)
    report = covered(model, x)
    assert report.plan.macs == counted(model, x) == batch * 3 * ROWS * 256
    assert report.share == 2 / 3
    (op,) = report.float_ops
    assert (op.op, op.reason) == ("mm", GLUE)


def test_only_the_first_call_counts() -> None:
    model = seeded(lambda: Head(lambda m, y: y @ m.matrix, nn.Identity, True))
    x = normal(2, 8, 16)
    quantizer = calibrated(model, [((x,), {})] * 3, backend="reference")
    assert quantizer.coverage(model).plan.macs == counted(model, x)


def test_a_first_call_in_inference_mode_counts_the_same() -> None:
    model = seeded(
        lambda: Head(lambda m, y: torch.einsum("bij,jk->bik", y, m.matrix), nn.Identity, True)
    )
    x = normal(2, 8, 16)
    with torch.inference_mode():
        report = covered(model, x)
    assert report.plan.macs == counted(model, x)


def test_counting_changes_no_value() -> None:
    """Of every third case; the others' operators differ in what they count alone."""
    for name, (compute, make, _) in third(CASES.items(), 0):
        model, x = seeded(lambda c=compute, m=make: Head(c, m, True)), normal(1, 8, 16)
        calib_model = Quantizer("reference").calib(model)
        for _ in range(2):
            assert torch.equal(calib_model(x), model(x)), name


def test_control_flow_in_python_runs_while_counting() -> None:
    class Cond(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: x @ x, lambda x: -x, (x,))

    x = normal(4, 4).abs()
    model = Cond()
    expected = model(x)
    with MacCounter():
        assert torch.equal(model(x), expected)


def test_an_operator_of_another_library_is_listed() -> None:
    library = torch.library.Library("honest_test", "DEF")
    library.define("mystery(Tensor x, Tensor y) -> Tensor")
    library.impl("mystery", lambda x, y: x @ y, "CompositeExplicitAutograd")
    torch.library.register_fake("honest_test::mystery", lambda x, y: x @ y)

    for split in (False, True):
        model = seeded(
            lambda s=split: Head(
                lambda m, y: torch.ops.honest_test.mystery(y, m.matrix), nn.Identity, s
            )
        )
        report = covered(model, normal(2, 8, 16))
        (op,) = report.float_ops
        assert op.op == "mystery"
        assert op.reason in (GLUE, "an operator of honest_test")
        assert "?" in str(report)
    library._destroy()


def test_constants_are_computed_once_so_they_do_not_count() -> None:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(16, 2)), nn.Parameter(torch.randn(2, 16))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, torch.addmm(self.a @ self.b, self.a, self.b))

    report = covered(seeded(Merged), normal(4, 16))
    assert sum(op.macs for op in report.float_ops) == 0


# ---- autocast


class Autocast(nn.Module):
    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            y = self.first(x)
        return self.second(y.float())


@pytest.mark.parametrize("enabled", [False, True])
def test_what_autocast_computes_stays_in_float_and_says_so(enabled: bool) -> None:
    model = seeded(lambda: Autocast(enabled))
    x = normal(4, 16)
    quantizer = calibrated(model, [((x,), {})], backend="reference")
    report = quantizer.coverage(model)
    assert report.share == 0.5
    (op,) = report.float_ops
    assert (op.name, op.op, op.macs) == ("first.linear", "linear", 4 * 256)
    wanted = "take autocast out of forward" if enabled else "autocast(enabled=False)"
    assert wanted in op.reason
    assert "50.0% of the multiply-accumulates" in quantizer.quantize(model).description
