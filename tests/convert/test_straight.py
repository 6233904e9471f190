"""Code whose recorded kernel might be wrong at another call runs itself; so does what changed."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import normal, seeded
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_quant import Backend, Quantizer, sqnr
from torch_quant.convert.quick import QuickCall
from torch_quant.native import joint

pytestmark = pytest.mark.skipif(
    Backend.ONEDNN.unavailable() is not None,
    reason=f"Backend.ONEDNN: {Backend.ONEDNN.unavailable()}; run on an x86 CPU",
)
SCALE = 1e-6


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(32) + 0.5), 1e-6
        self.config, self.numbers = SimpleNamespace(eps=1e-6), {"eps": 1e-6}
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x


class OfRank(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps) * self.weight


class OfLength(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * rms(x)
        return y * 1.5 if x.shape[-2] == 1 else y


class OfConfig(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.eps)


class OfEntry(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.numbers["eps"])


class OfGlobal(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + SCALE)


class ThroughView(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        _ = y.view(-1).clamp_(-0.5, 0.5)
        return y


class Counting(Norm):
    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Twice(Norm):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = rms(x) * self.weight
        return x


class Gated(nn.Module):
    def __init__(self, gate: int = 64) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(32, gate, bias=False), nn.Linear(32, 64, bias=False)
        self.down, self.fn = nn.Linear(64, 32, bias=False), F.silu

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.fn(self.gate(x)) * self.up(x))


class Model(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm, self.out = norm(), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


def pair(norm: Callable[[], nn.Module]) -> tuple[Any, Any]:
    """A model and its quantized twin, which was called twice."""
    model = seeded(lambda: Model(norm))
    quantizer = Quantizer("onednn", qconfig="int8_weight_only")
    quant_model: Any = quantizer.quantize(model, example_inputs=normal(2, 32))
    for _ in range(2):
        quant_model(normal(2, 32))
    return model, quant_model


def agree(model: Any, quant_model: Any, *shapes: tuple[int, ...]) -> None:
    for shape in shapes or ((2, 32), (1, 32), (3, 5, 32), (3, 1, 32)):
        x = 3 * normal(*shape)
        assert sqnr(model(x), quant_model(x)) > 20, shape  # code that is wrong is below 10


def is_quick(module: nn.Module) -> bool:
    call = vars(module).get("_compiled_call_impl")
    return isinstance(call, QuickCall) and call._function is not None


class Private(Norm):
    def __init__(self) -> None:
        super().__init__()
        self._eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._eps))


def test_private_numbers_may_change() -> None:
    model, quant_model = pair(Private)
    agree(model, quant_model)
    model.norm._eps = quant_model.norm._eps = 10.0
    agree(model, quant_model)


def test_first_calls_in_threads() -> None:
    """Others call a module while it finds out, at its first call, that it is not quick."""
    _, quant_model = pair(lambda: nn.Sequential(*(OfLength() for _ in range(40))))
    saved, x = pickle.dumps(quant_model), normal(2, 32)
    expected, results, before = quant_model(x), list[Tensor](), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(10):
            loaded, start = pickle.loads(saved), threading.Barrier(4)

            def call(loaded: Any = loaded, start: threading.Barrier = start) -> None:
                start.wait()
                with torch.no_grad():
                    results.append(loaded(x))

            threads = [threading.Thread(target=call) for _ in range(4)]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
    finally:
        sys.setswitchinterval(before)
    assert len(results) == 40
    assert all(torch.equal(each, expected) for each in results)


def test_straight_code_is_one_kernel() -> None:
    for norm in (Norm, Gated):
        model, quant_model = pair(norm)
        assert is_quick(quant_model.norm)
        agree(model, quant_model)


@pytest.mark.parametrize(
    "norm", [OfRank, OfLength, OfConfig, OfEntry, OfGlobal, ThroughView, Twice, lambda: Gated(1)]
)
def test_what_may_be_another_at_the_next_call(norm: Callable[[], nn.Module]) -> None:
    model, quant_model = pair(norm)
    agree(model, quant_model)
    if norm in (OfConfig, OfEntry):
        for each in (model.norm, quant_model.norm):
            each.config.eps = each.numbers["eps"] = 4.0
        agree(model, quant_model)


def test_a_state_of_its_own_counts_calls_once() -> None:
    model = seeded(lambda: Model(Counting))
    quantizer = Quantizer("onednn", qconfig="int8_weight_only")
    quant_model: Any = quantizer.quantize(model, example_inputs=normal(2, 32))
    before = float(quant_model.norm.calls)
    quant_model(normal(2, 32))
    assert float(quant_model.norm.calls) == before + 1


def _a_number(norm: Any) -> None:
    norm.eps = 3.0


def _a_function(norm: Any) -> None:
    norm.fn = torch.tanh


def _of_another_shape(norm: Any) -> None:
    norm.weight = nn.Parameter(torch.full((1,), 0.5))


def _pruned(norm: Any) -> None:
    prune.l1_unstructured(norm, "weight", amount=0.5)


@pytest.mark.parametrize(
    ("build", "change"),
    [(Norm, _a_number), (Gated, _a_function), (Norm, _of_another_shape), (Norm, _pruned)],
)
def test_what_changes_afterwards(build: Any, change: Callable[[Any], None]) -> None:
    model, quant_model = pair(build)
    assert is_quick(quant_model.norm)
    for each in (model.norm, quant_model.norm):
        change(each)
    agree(model, quant_model)
    agree(copy.deepcopy(model), copy.deepcopy(quant_model))


class Chain(nn.Module):
    """A norm of a norm, and two norms of one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x) + torch.sin(x)
        return self.a(rms(rms(y))) + self.b(rms(y, 1e-3)) + y


@pytest.mark.parametrize("qconfig", ["int8_static", "int8_weight_only"])
def test_norms_that_read_one_another(qconfig: str) -> None:
    model, x = seeded(Chain), normal(8, 32)
    quantizer = Quantizer("onednn", qconfig=qconfig, capture="whole")
    quantizer.calib(model)(x)
    quant_model = quantizer.quantize(model)
    simulated = quantizer.quantize(model, backend="reference")
    assert sqnr(simulated(x), quant_model(x)) > 35


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.between: Callable[[], Any] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        self.between()
        return y + self.k(x)


def test_weights_that_change_between_two_layers_of_one_input() -> None:
    model = seeded(Three)
    quantizer = Quantizer("onednn", qconfig="int8_weight_only")
    quant_model: Any = quantizer.quantize(model, example_inputs=normal(2, 32))
    x = normal(4, 32)
    quant_model(x), quant_model(x)
    alone = quant_model(x) - quant_model.q(x.clone())
    (scale,) = (each for name, each in quant_model.k.named_buffers() if "scale" in name)
    quant_model.between = lambda: scale.mul_(2)
    found = quant_model(x) - quant_model.q(x.clone())
    torch.testing.assert_close(found, 2 * alone)


@pytest.mark.newest("right there too, alone: behind other tests, their captures hold weights")
def test_tables_of_weights_go_with_the_model() -> None:
    tables = len(joint._TABLES)
    _, quant_model = pair(Gated)
    weights = [weakref.ref(x) for x in quant_model.buffers()]
    assert len(joint._TABLES) > tables
    del quant_model
    gc.collect()
    assert [ref() for ref in weights] == [None] * len(weights)
    assert len(joint._TABLES) <= tables


@pytest.mark.parametrize("function", ["relu", "gelu", "silu"])
def test_no_number_stays_none(function: str) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)
            self.fn = getattr(F, function)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.fn(self.first(x)))

    _, quant_model = pair(First)
    assert is_quick(quant_model.norm)
    x = normal(2, 32)
    x[0, 3] = float("nan")
    y = quant_model(x)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


class Picky(Norm):
    """Takes three rows and no others."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] != 3:
            raise LookupError("three rows, please")
        return super().forward(x)


def test_code_that_fails_tells_so_itself() -> None:
    model = seeded(lambda: Model(Picky))
    quantizer = Quantizer("onednn", qconfig="int8_weight_only")
    quant_model: Any = quantizer.quantize(model, example_inputs=normal(3, 32))
    agree(model, quant_model, (3, 32), (1, 3, 32), (3, 32))
    assert not is_quick(quant_model.norm)
    with pytest.raises(LookupError, match="three rows, please"):
        quant_model(normal(2, 32))
