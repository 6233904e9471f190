"""Products of two activations with scales that are chosen at each call: one for each vector that
is summed over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import normal, seeded
from torch import Tensor, nn

import torch_quant
from torch_quant import PerToken, QConfig, Quantizer, QuantSpec, sqnr
from torch_quant.core.functional import fake_quantize
from torch_quant.core.granularity import block_extremes
from torch_quant.core.qparams import choose_qparams
from torch_quant.ops.qdq import CHOOSE_QPARAMS

TOKENS = QuantSpec.of("uint8", granularity=PerToken(), dynamic=True)


def rows(x: Tensor) -> Tensor:
    """``x`` on a grid for each vector along its last dimension."""
    return fake_quantize(x, choose_qparams(*block_extremes(x, PerToken()), TOKENS))


def columns(x: Tensor) -> Tensor:
    return rows(x.transpose(-1, -2)).transpose(-1, -2)


class Call(nn.Module):
    """A function of tensors, as a model."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def attention_by_definition(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = rows(query) @ rows(key).transpose(-1, -2) / query.shape[-1] ** 0.5
    return rows(scores.softmax(-1)) @ columns(value)


def spread(*shape: int, salt: int = 0) -> Tensor:
    """Rows and columns of very different sizes, which one scale would not serve."""
    x = normal(*shape, salt=salt)
    x = x * torch.logspace(-1, 1, shape[-1])
    return x * torch.logspace(-1, 1, shape[-2])[:, None] if len(shape) > 1 else x


def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]]
CASES = {
    "matmul": (torch.matmul, lambda a, b: rows(a) @ columns(b), ((3, 5, 16), (3, 16, 7))),
    "one matrix": (torch.matmul, lambda a, b: rows(a) @ columns(b), ((3, 5, 16), (16, 7))),
    "a vector": (torch.matmul, lambda a, b: rows(a) @ rows(b), ((5, 16), (16,))),
    "bmm": (torch.bmm, lambda a, b: rows(a) @ columns(b), ((3, 5, 16), (3, 16, 7))),
    "squared": (lambda x: x @ x, lambda x: rows(x) @ columns(x), ((3, 8, 8),)),
    "attention": (attend, attention_by_definition, ((2, 4, 9, 8), (2, 4, 6, 8), (2, 4, 6, 8))),
    "of itself": (
        lambda x: attend(x, x, x),
        lambda x: attention_by_definition(x, x, x),
        ((2, 9, 8),),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_vector_that_is_summed_over_has_a_scale(name: str) -> None:
    function, definition, shapes = CASES[name]
    inputs = [spread(*shape, salt=i) for i, shape in enumerate(shapes)]
    quantizer = Quantizer("reference", qconfig=QConfig(TOKENS), capture="whole")
    model = Call(function)
    quantized = quantizer.quantize(model, example_inputs=tuple(inputs))
    assert quantizer.coverage(model).share == 1.0
    for factor in (1.0, 30.0):  # also where no calibration would have reached
        given = [x * factor if name != "attention" else x for x in inputs]
        assert sqnr(definition(*given), quantized(*given)) > 60.0  # some ties are rounded otherwise
    assert sqnr(function(*inputs), quantized(*inputs)) > 35.0


class Attention(nn.Module):
    """Two products that share an operand, and attention behind a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.project(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = attend(query, key, value).transpose(1, 2).flatten(2)
        z = self.out(y)
        return y @ z.transpose(1, 2), z.transpose(1, 2) @ z


def test_the_whole_workflow(tmp_path: Path) -> None:
    model, x = seeded(Attention).eval(), normal(3, 9, 16)
    quantizer = Quantizer("reference", qconfig=QConfig(TOKENS), capture="whole")
    quantized = quantizer.quantize(model, example_inputs=x)
    expected = quantized(x)
    assert quantizer.coverage(model).share == 1.0
    assert min(sqnr(a, b) for a, b in zip(model(x), expected, strict=True)) > 30.0
    for size in ((1, 1), (2, 30)):  # other sizes than those of the example
        other = normal(*size, 16)
        assert min(map(sqnr, model(other), quantized(other))) > 30.0
    targets = [node.target for node in quantized.graphs[0].body.graph.nodes]
    assert targets.count(CHOOSE_QPARAMS) == 9  # z by rows and by columns, each once
    torch_quant.save(quantized, tmp_path / "model")
    for again in (copy.deepcopy(quantized), torch_quant.load(tmp_path / "model", model=model)):
        assert all(map(torch.equal, again(x), expected))

    amp_model = quantizer.amp(model)
    amp_model(x)
    ranked = quantizer.sensitivity(amp_model)
    assert len(ranked) == 5
    assert all(site.score > 0.0 for site in ranked)

    qat_model = quantizer.qat(model)
    assert all(map(torch.equal, qat_model(x), expected))
    with torch.enable_grad():
        sum(each.square().mean() for each in qat_model(x)).backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())
    optimizer = torch.optim.SGD(quantizer.parameter_groups(qat_model, lr=0.1, scale_lr=1e-4))
    optimizer.step()
    trained = quantizer.quantize(qat_model.eval())
    assert all(map(torch.equal, trained(x), qat_model(x)))
    assert not torch.equal(trained(x)[0], expected[0])


def test_a_mask_that_hides_a_whole_row_gives_zeros() -> None:
    inputs = [normal(2, 5, 8, salt=i) for i in range(3)]
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    mask[0, 2] = False
    quantizer = Quantizer("reference", qconfig=QConfig(TOKENS), capture="whole")
    quantized = quantizer.quantize(Call(masked), example_inputs=(*inputs, mask))
    y = quantized(*inputs, mask)
    assert torch.equal(y[0, 2], torch.zeros(8))
    assert sqnr(masked(*inputs, mask), y) > 35.0


def test_backends_without_such_kernels_leave_products_in_float_and_say_why() -> None:
    model, x = seeded(Attention).eval(), normal(3, 9, 16)
    quantizer = Quantizer("onednn", qconfig=QConfig(TOKENS), capture="whole")
    reasons = quantizer.coverage(model, x).reasons
    assert len(reasons) == 3
    assert all("not at each call" in reason for reason in reasons.values())


def test_groups_are_for_what_a_weight_is_multiplied_with() -> None:
    groups = QuantSpec.of("uint8", granularity=torch_quant.PerGroup(8), dynamic=True)
    model, x = seeded(Attention).eval(), normal(3, 9, 16)
    quantizer = Quantizer("reference", qconfig=QConfig(groups), capture="whole")
    reasons = quantizer.coverage(model, x).reasons
    assert len(reasons) == 3
    wanted = "activations have one scale for the whole tensor, or dynamic ones for tokens"
    assert all(wanted in reason for reason in reasons.values())
