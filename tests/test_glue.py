"""Python code over pieces reaches into its children, and is compared with the float module."""

from __future__ import annotations

import copy
import inspect
import logging
from pathlib import Path

import pytest
import torch
from flows import BACKENDS
from models import normal, seeded
from torch import Tensor, nn

from torch_quant import Quantizer, load, save, sqnr


class Reaches(nn.Module):
    """Its Python code calls parts of a child, and methods of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.head(self.body.decoder(x) + self.body.project(x))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.proj = nn.Linear(16, 16)

    def project(self, x: Tensor) -> Tensor:
        return self.proj(x) * self.proj.weight.mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_child_that_glue_calls_are_quantized(backend: str) -> None:
    model, x = seeded(Reaches).eval(), normal(8, 16)
    quantizer = Quantizer(backend)
    assert torch.equal(quantizer.calib(model)(x), model(x))
    quant_model = quantizer.quantize(model)
    assert set(quantizer.plan.quantized) == {"head", "body.decoder.0", "body.proj"}
    assert sqnr(model(x), quant_model(x)) > 25
    assert torch.equal(copy.deepcopy(quant_model)(x), quant_model(x))


class Walks(nn.Module):
    """Its Python code counts parameters."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.body, self.head, self.whole = Body(), nn.Linear(16, 4), whole

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        owner = self if self.whole else self.body.decoder[0]
        count = sum(each.numel() for each in owner.parameters())  # here
        return self.head(self.body.decoder(x)) * count


@pytest.mark.parametrize("whole", [True, False])
def test_code_that_counts_parameters_is_told(whole: bool, caplog: pytest.LogCaptureFixture) -> None:
    calib_model = Quantizer("reference").calib(Walks(whole).eval())
    with caplog.at_level(logging.WARNING, "torch_quant"):
        for _ in range(2):
            calib_model(normal(8, 16))
    lines, start = inspect.getsourcelines(Walks)
    line = start + next(i for i, text in enumerate(lines) if "# here" in text)
    told = [text for text in caplog.messages if "goes through all parameters" in text]
    assert len(told) == 1
    assert told[0].startswith(f"{__file__}:{line} ")


class KnowsParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        weight = self.get_parameter("linear.weight")
        factor = (2 if isinstance(weight, nn.Parameter) else 3) * weight.shape[0]
        return self.linear(x) * (factor if weight.requires_grad else -factor)


@pytest.mark.parametrize("trained", [True, False])
def test_what_stands_for_a_weight_is_a_parameter(trained: bool, tmp_path: Path) -> None:
    model, x = seeded(KnowsParameters).eval().requires_grad_(trained), normal(8, 16)
    quantizer = Quantizer("reference")
    assert torch.equal(quantizer.calib(model)(x), model(x))
    quant_model = quantizer.quantize(model)
    assert quantizer.plan.quantized
    assert sqnr(model(x), quant_model(x)) > 25
    assert "weight" not in dict(quant_model.linear.named_parameters())
    save(quant_model, tmp_path / "model")
    loaded = load(tmp_path / "model", model=model)
    for each in (copy.deepcopy(quant_model), loaded, quant_model.to("cpu")):
        assert torch.equal(each(x), quant_model(x))


class AsksItsDtype(nn.Module):
    """As ``PreTrainedModel.dtype`` and ``.device`` do, in code that cannot be one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parameter = next(self.parameters())
        y = self.linear(x.to(parameter.dtype).to(parameter.device))
        return y if y.sum() < 1e9 else x


def test_glue_may_ask_for_its_parameters() -> None:
    model, x = seeded(AsksItsDtype).eval(), normal(4, 16)
    quantizer = Quantizer("reference")
    assert torch.equal(quantizer.calib(model)(x), model(x))
    assert sqnr(model(x), quantizer.quantize(model)(x)) > 25


class LooksBack(nn.Module):
    """In pieces; reads what the last call of a child has left in an attribute of the child."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.head = Leaves(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.child(x)
        return self.head(y + self.child.last) if y.sum() < 1e9 else y


class Leaves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.inner(x).tanh()
        return self.last * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_glue_reads_what_a_child_has_left(backend: str) -> None:
    model, x = seeded(LooksBack).eval(), normal(4, 16)
    quantizer = Quantizer(backend)
    calib_model = quantizer.calib(model)
    for batch in (4, 2):
        assert torch.equal(calib_model(normal(batch, 16)), model(normal(batch, 16)))
    assert quantizer.state.batches == 2
    quant_model = quantizer.quantize(model)
    assert set(quantizer.plan.quantized) == {"child.inner", "head"}
    assert sqnr(model(x), quant_model(x)) > 25
    later = Quantizer(backend)
    later.load_state_dict(quantizer.state_dict())
    again = later.quantize(seeded(LooksBack).eval(), example_inputs=x)
    assert torch.equal(again(x), quant_model(x))


class Counted(nn.Module):
    """In pieces; looks up by the very class of its child what to do, and finds a stand-in's."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.child(x)
        return self.head(y * 3 if type(self.child) is nn.Linear else y) if y.sum() < 1e9 else y


def test_a_difference_on_the_first_call_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), seeded(Counted)).eval(), normal(4, 16)
    quantizer = Quantizer("reference")
    assert torch.equal(quantizer.calib(model)(x), model(x))
    assert "1: its pieces give another result than the module" in caplog.text
    assert quantizer.state.batches == 1
    quant_model = quantizer.quantize(model)
    assert quantizer.plan.quantized == ("0",)
    assert "1" in dict(quantizer.coverage(model).glue)
    assert sqnr(model(x), quant_model(x)) > 25
