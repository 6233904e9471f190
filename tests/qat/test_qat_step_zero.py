"""Before the first step a QAT model computes what ``quantize`` deploys, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import MODELS, normal, tokens
from qat_training import FOUR_BITS, calibrated, loss_of, quiet, simulation, skip_beside_ipex
from thinning import some
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import ZOO, samples, zoo_model

from torch_quant import (
    FLOAT,
    PerGroup,
    PerToken,
    QConfig,
    Quantizer,
    QuantSpec,
    RoundToNearest,
    recipes,
)
from torch_quant.ops.experts import GROUPED_LINEAR
from torch_quant.qat.model import QatModel

pytestmark = pytest.mark.usefixtures("grad")

SIMULATED = ("reference", "onednn")


def assert_same(actual: Any, expected: Any) -> None:
    """Equal to the bit, leaf by leaf."""
    ours, theirs = (pytree.tree_leaves(_plain(each)) for each in (actual, expected))
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        assert not isinstance(x, Tensor) or torch.equal(x, y)


def _plain(outputs: Any) -> Any:
    return outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs


@pytest.mark.thin
@pytest.mark.parametrize("backend", SIMULATED)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_reference(name: str, backend: str) -> None:
    quantizer, model, inputs = calibrated(name, backend=backend)
    expected = quiet(quantizer.quantize(model, backend=simulation(backend)), inputs)
    qat_model = quantizer.qat(model)
    assert isinstance(qat_model, QatModel)
    assert isinstance(qat_model, type(model))
    assert_same(quiet(qat_model, inputs), expected)
    assert_same(qat_model(*inputs), expected)  # with gradients
    assert not torch.equal(quiet(model, inputs), expected)


FORMATS = {
    "w4a4": FOUR_BITS,
    "w2a8": QConfig(weight=QuantSpec.of("int2", per_channel=True)),
    "groups": QConfig(input=FLOAT, weight=QuantSpec.of("int4", granularity=PerGroup(8))),
    "affine groups": QConfig(
        weight=QuantSpec.of("uint4", granularity=PerGroup(8)), input=QuantSpec.of(bits=7)
    ),
    "float8": QConfig(
        input=QuantSpec.of("float8_e5m2"), weight=QuantSpec.of("float8_e4m3fn", per_channel=True)
    ),
    "mx": QConfig(
        input=FLOAT,
        weight=QuantSpec.of("float4_e2m1", granularity=PerGroup(8), scale_type="e8m0"),
    ),
    "half scales": QConfig(weight=QuantSpec.of(bits=6, signed=True, scale_type="float16")),
    "dynamic": QConfig(
        input=QuantSpec.of(bits=8, granularity=PerToken(), dynamic=True),
        weight=QuantSpec.of("int4", granularity=PerGroup(8)),
    ),
    "full range": QConfig(weight=QuantSpec.of("int3"), method=RoundToNearest(full_range=True)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name: str) -> None:
    quantizer, model, inputs = calibrated("mlp", qconfig=FORMATS[name], capture="whole")
    expected = quiet(quantizer.quantize(model), inputs)
    qat_model = quantizer.qat(model, edge_bits=None)
    assert_same(qat_model(*inputs), expected)
    loss_of(qat_model(*inputs)).backward()
    for each, parameter in qat_model.named_parameters():
        assert parameter.grad is not None, each
        assert bool(parameter.grad.isfinite().all()), each
        assert parameter.grad.abs().sum() > 0, each


@pytest.mark.parametrize("name", some(ZOO, "resnet", "gpt2"))
def test_the_zoo(name: str) -> None:
    """And every parameter that has a gradient in float has a finite one after a step."""
    skip_beside_ipex()
    model, batches = zoo_model(name), samples(name, 4)
    quantizer = Quantizer("reference", qconfig=recipes.fast())
    calib_model = quantizer.calib(model)
    for batch in batches:
        calib_model(**batch)
    expected = quantizer.quantize(model)
    qat_model = quantizer.qat(model)
    with torch.no_grad():
        assert_same(qat_model(**batches[0]), expected(**batches[0]))
    loss_of(model(**batches[0])).backward()
    learning = [n for n, p in model.named_parameters() if p.grad is not None]
    model.zero_grad()
    loss_of(qat_model(**batches[0])).backward()
    parameters = dict(qat_model.named_parameters())
    for each in learning:
        assert parameters[each].grad is not None, each
    optimizer = torch.optim.SGD(quantizer.parameter_groups(qat_model, lr=1e-4, scale_lr=1e-6))
    optimizer.step()
    for each, parameter in parameters.items():
        assert bool(parameter.isfinite().all()), each
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), each
    with torch.no_grad():
        assert_same(quantizer.quantize(qat_model)(**batches[0]), qat_model(**batches[0]))


def test_a_language_model_by_its_weights() -> None:
    """Layers are captured one by one there, and the rest is the model's own Python."""
    model = zoo_model("llama_cache")
    ids = tokens(2, 12, 128)
    quantizer = Quantizer("reference", qconfig=recipes.int4_weight_only(group_size=16))
    expected = quiet(quantizer.quantize(model, example_inputs=(ids,)), (ids,))
    qat_model = quantizer.qat(model, edge_bits=None)
    assert_same(quiet(qat_model, (ids,)), expected)
    loss_of(qat_model(ids).logits).backward()
    lacking = [n for n, p in qat_model.named_parameters() if p.grad is None]
    assert lacking == []


class _Pieces(nn.Module):
    """Python that reads a value: two graphs, and code between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if float(x.detach().max()) > 1e6:
            return x
        return self.second(self.drop(x))


def test_a_model_in_pieces() -> None:
    quantizer, model, inputs = calibrated(_Pieces().eval(), normal(16, 8))
    expected = quiet(quantizer.quantize(model), inputs)
    qat_model = quantizer.qat(model)
    assert_same(qat_model(*inputs), expected)
    loss_of(qat_model(*inputs)).backward()
    assert all(p.grad is not None for p in qat_model.parameters())
    assert_same(quiet(quantizer.quantize(qat_model), inputs), expected)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def test_tied_weights_stay_tied_and_share_a_scale() -> None:
    quantizer, model, inputs = calibrated(_Tied(), normal(16, 8))
    qat_model = quantizer.qat(model)
    assert qat_model.b.weight is qat_model.a.weight is model.a.weight
    scales = [n for n, _ in qat_model.named_parameters() if n.endswith("weight_scale")]
    assert len(scales) == 1
    loss_of(qat_model(*inputs)).backward()
    assert_same(quiet(quantizer.quantize(qat_model), inputs), quiet(qat_model, inputs))


def test_what_has_no_gradient_quantized_trains_in_float() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0])

    quantizer, model, inputs = calibrated(Reader(), normal(4, 5, 8))
    qat_model = quantizer.qat(model)
    assert "no gradient" in qat_model.plan["lstm"].reason
    assert qat_model.plan["head"].quantized
    loss_of(qat_model(*inputs)).backward()
    assert all(p.grad is not None for p in qat_model.parameters())
    deployed = quantizer.quantize(qat_model)
    assert not deployed.plan["lstm"].quantized
    assert_same(quiet(deployed, inputs), quiet(qat_model, inputs))


def test_experts_train() -> None:
    """Their products are an operator of this package, whose gradient is its own."""
    x, weight = normal(10, 4).requires_grad_(), normal(9, 4).requires_grad_()
    ends = torch.tensor([3, 3, 8])
    y = GROUPED_LINEAR(x, weight, ends)
    y.square().sum().backward()
    found = [x.grad.clone(), weight.grad.clone()]
    x.grad = weight.grad = None
    parts = [x[:3] @ weight[:3].T, x[3:8] @ weight[6:].T]
    sum(part.square().sum() for part in parts).backward()
    torch.testing.assert_close(found, [x.grad, weight.grad])

    model, batches = zoo_model("mixtral"), samples("mixtral", 4)
    quantizer = Quantizer("reference", qconfig=recipes.fast())
    with torch.no_grad():
        for batch in batches:
            quantizer.calib(model)(**batch)
    qat_model = quantizer.qat(model)
    loss_of(qat_model(**batches[0]).logits).backward()
    lacking = [name for name, p in model.named_parameters() if p.grad is None]
    assert lacking == []
    with torch.no_grad():
        deployed = quantizer.quantize(qat_model)
        assert_same(deployed(**batches[0]).logits, qat_model(**batches[0]).logits)
