"""Dropout in train mode, although graphs were captured in eval mode."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from models import normal
from qat_training import calibrated, loss_of, quiet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import ZOO, zoo_model

from torch_quant import Quantizer, recipes, switch

pytestmark = pytest.mark.usefixtures("grad")


class Dropping(nn.Module):
    """Before, between and behind layers; as a module, as a function and in place."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))
        self.drop, self.p = nn.Dropout(p), p

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.25, self.training)
        x = x + self.drop(self.first(x).relu())
        x = F.dropout(self.second(x), self.p, self.training, inplace=True)
        return self.drop(self.third(x))


def test_it_drops_in_train_mode_alone() -> None:
    quantizer, model, inputs = calibrated(Dropping().eval(), normal(64, 16))
    expected = quiet(quantizer.quantize(model), inputs)
    qat_model = quantizer.qat(model)
    assert torch.equal(quiet(qat_model, inputs), expected)
    qat_model.train()
    torch.manual_seed(0)
    first = quiet(qat_model, inputs)
    second = quiet(qat_model, inputs)
    torch.manual_seed(0)
    assert torch.equal(quiet(qat_model, inputs), first)
    assert not torch.equal(first, second)
    share = float((first == 0).float().mean())
    assert abs(share - 0.5) < 0.06  # 1024 draws: four standard deviations
    assert torch.equal(quiet(qat_model.eval(), inputs), expected)
    assert torch.equal(quiet(quantizer.quantize(qat_model.train()), inputs), expected)


def test_every_place_of_it() -> None:
    """Each dropout is a node of its own, with its own probability."""
    quantizer, model, _ = calibrated(Dropping(0.125).eval(), normal(64, 16))
    graph = quantizer.qat(model).train().graphs[0].body.graph
    found = graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
    assert [node.args[1:] for node in found] == [(0.25, True), *[(0.125, True)] * 3]


def test_noise_is_that_of_the_float_model() -> None:
    """With 8 bits, the spread over many draws is nearly that of the float model.

    What is dropped is rounded first: rounding after it would cut off what the factor of 2 makes.
    """
    quantizer, model, inputs = calibrated(Dropping().eval(), normal(64, 16))
    qat_model = quantizer.qat(model).train()
    torch.manual_seed(0)
    ours = torch.stack([quiet(qat_model, inputs) for _ in range(200)])
    model.train()
    theirs = torch.stack([quiet(model, inputs) for _ in range(200)])
    model.eval()
    assert abs(float(ours.std() / theirs.std()) - 1.0) < 0.05
    error = (ours.mean(0) - theirs.mean(0)).square().mean() / theirs.var(0).mean()
    assert float(error) < 4 / 200  # means of 200 draws differ by 2 / 200 of the variance


def test_copies_and_checkpointing() -> None:
    quantizer, model, inputs = calibrated(Dropping().eval(), normal(64, 16))
    qat_model = quantizer.qat(model).train()
    copied = copy.deepcopy(qat_model)
    torch.manual_seed(0)
    loss_of(qat_model(*inputs)).backward()
    expected = model.first.weight.grad.clone()
    qat_model.zero_grad()
    torch.manual_seed(0)
    loss_of(copied(*inputs)).backward()
    assert torch.equal(copied.first.weight.grad, expected)
    torch.manual_seed(0)
    x = inputs[0].clone().requires_grad_()
    loss_of(checkpoint(qat_model, x, use_reentrant=False)).backward()
    assert torch.equal(model.first.weight.grad, expected)


def test_compiled_models_follow_the_mode() -> None:
    quantizer, model, inputs = calibrated(Dropping().eval(), normal(64, 16))
    expected = quiet(quantizer.quantize(model), inputs)
    qat_model = quantizer.qat(model).train()
    compiled = torch.compile(qat_model, backend="eager")
    assert not torch.equal(quiet(compiled, inputs), quiet(compiled, inputs))
    qat_model.eval()
    assert torch.equal(quiet(compiled, inputs), expected)
    qat_model.train()
    assert not torch.equal(quiet(compiled, inputs), quiet(compiled, inputs))


def test_calls_that_are_captured_while_training() -> None:
    class Scored(Dropping):
        def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
            y = super().forward(x)
            return y if factor is None else y * factor

    quantizer, model, (x,) = calibrated(Scored().eval(), normal(64, 16))
    qat_model = quantizer.qat(model).train()
    y = qat_model(x, torch.ones(16))
    assert int((y == 0).sum()) > 400
    assert int((qat_model.eval()(x, torch.ones(16)) == 0).sum()) < 50


def test_a_published_architecture() -> None:
    model, entry = zoo_model("bert"), ZOO["bert"]
    quantizer = Quantizer("reference", qconfig=recipes.fast())
    with torch.no_grad():
        quantizer.calib(model)(**entry.inputs(4))
    qat_model = quantizer.qat(model).train()
    (graph,) = qat_model.graphs
    drops = [n for n in graph.body.graph.nodes if n.target is torch.ops.aten.dropout.default]
    modules = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    # The dropout of attention is an argument of the fused operator, which is 0 in eval mode.
    attention = model.config.num_hidden_layers
    assert len(drops) == len(modules) - attention
    assert all(node.args[2] for node in drops)


def test_one_without_a_place_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)
            self.drop = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.drop(self.linear(x)))

    quantizer, model, inputs = calibrated(Between().eval(), normal(64, 16))
    with caplog.at_level(logging.WARNING, "torch_quant"):
        qat_model = quantizer.qat(model)
    assert "dropout stays off while training in drop" in caplog.text
    expected = quiet(quantizer.quantize(model), inputs)
    switch(qat_model.train(), freeze_bn=True)
    assert torch.equal(quiet(qat_model, inputs), expected)
