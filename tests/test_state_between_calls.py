"""Modules that keep something between calls: proxies and quantized models do so too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import torch
from flows import BACKENDS, assert_unchanged, snapshot
from models import normal, seeded
from thinning import rarely
from torch import Tensor, nn

from torch_quant import Quantizer, sqnr
from torch_quant.errors import NotCalibrated

pytestmark = pytest.mark.sparse


class Smoother(nn.Module):
    """Streams: each result depends on the last one, which is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.reset()

    def reset(self) -> None:
        self.h: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.h = y if self.h is None else 0.5 * (y + self.h)
        return self.h


class History(nn.Module):
    """Keeps a list, and averages over it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.reset()

    def reset(self) -> None:
        self.past: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.past.append(self.linear(x))
        return torch.stack(self.past[-3:]).mean(0)


class BufferState(nn.Module):
    """Keeps its state in a buffer that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("h", torch.zeros(3, 16))

    def forward(self, x: Tensor) -> Tensor:
        self.h = 0.5 * (self.linear(x) + self.h)
        return self.h


class ArrayState(nn.Module):
    """Counts its calls in a NumPy array."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.reset()

    def reset(self) -> None:
        self.count = np.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.count[0] += 1
        return self.linear(x) / float(self.count[0])


class Slots:
    __slots__ = ("h",)

    def __init__(self) -> None:
        self.h: Tensor | None = None


class ObjectState(nn.Module):
    """Keeps its state in an object without a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.reset()

    def reset(self) -> None:
        self.kept = Slots()

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.kept.h = y if self.kept.h is None else 0.5 * (y + self.kept.h)
        return self.kept.h.clone()


def nested(inner: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(16, 16), inner(), nn.ReLU(), nn.Linear(16, 4))


STATEFUL = {
    "attribute": Smoother,
    "list": History,
    "buffer": BufferState,
    "array": ArrayState,
    "slots": ObjectState,
    "attribute below": nested(Smoother),
    "list below": nested(History),
    "buffer below": nested(BufferState),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STATEFUL)
def test_a_sequence_of_calls(name: str, backend: str) -> None:
    model, same, other = (seeded(STATEFUL[name]).eval() for _ in range(3))
    calls = [normal(3, 16, salt=i) for i in range(5)]
    quantizer = Quantizer(backend)
    calib_model = quantizer.calib(model)
    for x in calls:
        assert torch.equal(calib_model(x), same(x))
    fresh = seeded(STATEFUL[name]).eval()
    later = Quantizer(backend)
    later.load_state_dict(quantizer.state_dict())
    quant_model = later.quantize(fresh, example_inputs=calls[0])
    assert len(later.plan.quantized) == sum(isinstance(m, nn.Linear) for m in model.modules())
    if "buffer" in name:  # what is captured whole ran on the model's own buffer
        quant_model = later.quantize(seeded(STATEFUL[name]).eval(), example_inputs=calls[0])
    expected = [other(x) for x in calls]
    actual = [quant_model(x) for x in calls]
    assert all(sqnr(y, z) > 20 for y, z in zip(expected, actual, strict=True))


def test_proxies_keep_a_state_of_their_own() -> None:
    model = seeded(Smoother).eval()
    before = snapshot(model)
    quantizer = Quantizer("reference")
    first, second = quantizer.calib(model), quantizer.calib(model)
    x = normal(3, 16)
    outputs = [first(x), first(x + 1), first(x - 1)]
    assert model.h is None
    assert_unchanged(model, before)
    assert torch.equal(second(x), outputs[0])  # it begins where the model is
    assert torch.equal(model(x), outputs[0])
    assert torch.equal(first.h, outputs[-1])  # its state can be looked at
    first.reset()
    assert torch.equal(first(x), outputs[0])
    model.reset()
    quant_model = quantizer.quantize(model)
    results = [quant_model(x), quant_model(x + 1)]
    quant_model.reset()
    assert torch.equal(quant_model(x), results[0])
    again = copy.deepcopy(quant_model)
    assert torch.equal(again(x + 1), results[1])


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(16, 16), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


def test_an_attribute_that_changes_after_capture() -> None:
    model, x = seeded(Scaled).eval(), normal(4, 16)
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    calib_model(x)
    earlier = quantizer.quantize(model)
    expected = earlier(x)
    model.scale = 3.0
    with pytest.raises(NotCalibrated, match="scale of the model changed"):
        quantizer.quantize(model)
    assert torch.equal(calib_model(x), model(x))
    assert sqnr(model(x), quantizer.quantize(model)(x)) > 25
    assert torch.equal(earlier(x), expected)


class Activated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.act(x) if hasattr(self, "act") else x)


@pytest.mark.parametrize("capture", ["whole", "modules"])
@pytest.mark.parametrize("other", [nn.Tanh(), None], ids=["replaced", "deleted"])
def test_a_module_without_parameters_that_is_replaced(
    other: nn.Module | None, capture: str
) -> None:
    """Before any data was seen: later the quantizer asks for a new one."""
    model, x = seeded(Activated).eval(), normal(4, 16)
    quantizer = Quantizer("int8_dynamic", backend="reference", capture=capture)
    quantizer.coverage(model, example_inputs=(x,))
    if other is None:
        del model.act
    else:
        model.act = other
    with pytest.raises(NotCalibrated, match="class of act of the model changed"):
        quantizer.quantize(model)
    assert sqnr(model(x), quantizer.quantize(model, example_inputs=(x,))(x)) > 25


class Hidden(nn.Module):
    """Keeps its state where no attribute leads."""

    shared: ClassVar[dict[str, Tensor]] = {}

    def __init__(self, *, in_closure: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        kept = {} if in_closure else self.shared
        kept.clear()

        def smoothed(y: Tensor) -> Tensor:
            kept["h"] = 0.5 * (y + kept["h"]) if "h" in kept else y
            return kept["h"]

        self.smoothed = smoothed

    def forward(self, x: Tensor) -> Tensor:
        return self.smoothed(self.linear(x)).relu()


@pytest.mark.parametrize("in_closure", [True, rarely(False)])
def test_tensors_that_only_code_finds_hold_values(in_closure: bool) -> None:
    """Exported, they would be replaced by such without values, for good."""
    calls = [normal(3, 16, salt=i) for i in range(4)]
    reference = seeded(lambda: Hidden(in_closure=in_closure)).eval()
    expected = [reference(x) for x in calls]
    model, quantizer = seeded(lambda: Hidden(in_closure=in_closure)).eval(), Quantizer("reference")
    calib_model = quantizer.calib(model)
    for x, y in zip(calls, expected, strict=True):
        assert torch.equal(calib_model(x), y)
    assert "a global, a closure or a class" in calib_model.captured.root.failure
    quant_model = quantizer.quantize(model)
    assert quantizer.plan.quantized == ("linear",)
    for _ in range(12):  # until nothing is left of what came before
        found = quant_model(calls[0])
    assert sqnr(model.linear(calls[0]).relu(), found) > 20
