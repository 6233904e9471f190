"""A quantized model is a snapshot of the float model."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from flows import BACKENDS, CASES, calibrated, run
from models import normal, seeded
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant import ModuleFilter, QuantError, Quantizer
from torch_quant.convert.ownership import Owner
from torch_quant.convert.quantized import QuantizedModule


def other_values(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: x * -3 + 1 if x.is_floating_point() else x for name, x in model.state_dict().items()
    }


def leaves(outputs: object) -> list[Tensor]:
    return [x.clone() for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


NAMES = ["branch_on_data", "routed_experts", "tied_embedding", "reused_linear"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_new_weights_of_the_float_model_do_not_reach_it(name: str, backend: str) -> None:
    case = CASES[name]
    model = case.build()
    quant_model = calibrated(model, case.ones(), backend=backend).quantize(model)
    before = leaves(run(quant_model, case.inputs(2)))
    model.load_state_dict(other_values(model))
    for x in model.parameters():
        x.data.add_(1)
    for x, y in zip(before, leaves(run(quant_model, case.inputs(2))), strict=True):
        assert torch.equal(x, y)


def in_float(model: nn.Module, **options: bool) -> tuple[Quantizer, QuantizedModule]:
    """All but the first layer of ``model`` in float."""
    quantizer = calibrated(
        model, [((normal(8, 256),), {})], module_filter=ModuleFilter(include_names="0")
    )
    return quantizer, quantizer.quantize(model, **options)


def three() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 256))
    model[2].weight = model[1].weight
    return model.eval()


def test_tied_weights_are_copied_once() -> None:
    _, quant_model = in_float(seeded(three))
    state = quant_model.state_dict()
    large = {
        x.data_ptr() for x in state.values() if x.shape == (256, 256) and x.is_floating_point()
    }
    assert len(large) == 1


@pytest.mark.parametrize("share", [False, True])
def test_large_weights_are_shared_on_request(share: bool) -> None:
    model = seeded(three)
    _, quant_model = in_float(model, share_float_weights=share)
    held = {x.data_ptr() for x in quant_model.state_dict().values()}
    assert (model[1].weight.data_ptr() in held) == share
    assert model[1].bias.data_ptr() not in held


def change_by_state(model: nn.Module) -> None:
    model.load_state_dict(other_values(model))


def change_by_step(model: nn.Module) -> None:
    with torch.enable_grad():
        model.requires_grad_()(normal(2, 256)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize("change", [change_by_state, change_by_step])
def test_a_change_of_a_shared_weight_is_refused(change: object) -> None:
    model = seeded(three)
    quantizer, quant_model = in_float(model, share_float_weights=True)
    x = normal(2, 256)
    expected = quant_model(x)
    twin = copy.deepcopy(quant_model)
    change(model)  # type: ignore[operator]
    with pytest.raises(QuantError, match=r"1\.weight of the float model was changed"):
        quant_model(x)
    assert torch.equal(twin(x), expected)  # a copy has tensors of its own
    quantizer.quantize(model, share_float_weights=True)(x)


def test_other_dealings_with_the_float_model_are_none_of_it() -> None:
    model = seeded(three)
    _, quant_model = in_float(model, share_float_weights=True)
    x = normal(2, 256)
    expected = quant_model(x)
    model.load_state_dict(other_values(model), assign=True)
    model.double()
    assert torch.equal(quant_model(x), expected)
    buffer = io.BytesIO()
    torch.save(quant_model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


class WithLSTM(nn.Module):
    """In pieces, with a float LSTM, which keeps a second list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        if float(y.sum()) > 1e9:
            y = y + 1
        return self.head(y) + self.shift


class PlainTensors(nn.Module):
    """Keeps tensors as attributes, beside buffers, and computes with them in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.shift, self.scales = torch.ones(8), {"all": [torch.full((8,), 2.0)]}

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * self.scales["all"][0]
        if y.sum() > 1e9:
            y = y + 1
        return self.head(y + self.shift)


@pytest.mark.parametrize("capture", ["whole", "modules"])
def test_plain_tensors_of_python_code_are_part_of_the_snapshot(capture: Any) -> None:
    model, x = seeded(PlainTensors).eval(), normal(3, 8)
    quantizer = Quantizer("reference", capture=capture)
    assert torch.equal(quantizer.calib(model)(x), model(x))
    quant_model = quantizer.quantize(model)
    expected = quant_model(x)
    model.shift.add_(3)
    model.scales["all"][0].mul_(-2)
    assert torch.equal(quant_model(x), expected)


def test_layers_in_pieces_are_part_of_the_snapshot() -> None:
    model = seeded(WithLSTM).eval()
    x = normal(3, 5, 8)
    quant_model = calibrated(model, [((x,), {})], backend="reference").quantize(model)
    expected = quant_model(x)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.mul_(-2)
    assert torch.equal(quant_model(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_scripted_children_are_copied() -> None:
    layer = torch.jit.script(nn.Linear(4, 4))
    model = nn.Sequential(layer, nn.ReLU(), layer)
    expected = model(normal(2, 4))
    Owner(dict(model.named_parameters()), None).take(model.modules())
    with torch.no_grad():
        layer.weight.zero_()
    assert model[0] is model[2]
    assert torch.equal(model(normal(2, 4)), expected)


def test_expanded_buffers_stay_small() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("mask", torch.randn(1, 8).expand(4000, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.mask[: x.shape[0]]

    model = seeded(Masked)
    quant_model = calibrated(model, [((normal(3, 8),), {})], backend="reference").quantize(model)
    (mask,) = [x for x in quant_model.state_dict().values() if x.shape == (4000, 8)]
    assert mask.untyped_storage().nbytes() == 32
    before = quant_model(normal(2, 8))
    model.mask[0, 0] = 100.0
    assert torch.equal(quant_model(normal(2, 8)), before)
