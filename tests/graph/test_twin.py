from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from awkward import AWKWARD
from models import MODELS, example, mlp, normal, small_cnn
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from torch_quant.graph.twin import twin_of


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a twin must not change in the model, by value or by identity."""
    facts: dict[str, Any] = {"keys": list(model.state_dict())}
    for name, module in model.named_modules():
        facts[name] = (
            id(module),
            type(module),
            module.training,
            {key: id(value) for key, value in module.__dict__.items()},
            {key: id(x) for key, x in (*module._parameters.items(), *module._buffers.items())},
            {key: id(child) for key, child in module._modules.items()},
            sum(len(hooks) for key, hooks in module.__dict__.items() if "_hooks" in key),
        )
    return facts


@pytest.mark.parametrize("name", MODELS)
def test_nothing_done_to_the_twin_reaches_the_model(name: str) -> None:
    model = MODELS[name]().train()
    before = snapshot(model)
    twin = twin_of(model)
    twin.train()
    for module in twin.modules():
        module.register_forward_hook(lambda _module, _args, out: out)
        module.register_buffer("extra", torch.ones(1))
        module.note = "set on the twin"  # type: ignore[assignment]
    twin.add_module("added", nn.Linear(1, 1))
    for child in list(twin._modules):
        delattr(twin, child)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_buffers_are_the_models_own(name: str) -> None:
    model = MODELS[name]()
    twin = twin_of(model)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shared = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    assert list(shared) == list(own)
    assert all(shared[key] is own[key] for key in own)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert not {id(m) for m in twin.modules()} & {id(m) for m in model.modules()}


@pytest.mark.parametrize("name", MODELS)
def test_computes_the_models_output_in_eval_mode(name: str) -> None:
    model = MODELS[name]()
    expected = model(*example(name))
    model.train()
    twin = twin_of(model)
    assert not any(module.training for module in twin.modules())
    assert all(module.training for module in model.modules())
    assert torch.equal(twin(*example(name)), expected)


def test_a_changed_parameter_is_seen_by_the_twin() -> None:
    model = mlp()
    twin = twin_of(model)
    x = normal(2, 16)
    model[0].weight.mul_(2)
    assert torch.equal(twin(x), model(x))


def test_a_module_used_twice_stays_one_module() -> None:
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear, nn.ReLU(), nn.Sequential(linear))
    twin = twin_of(model)
    assert twin[0] is twin[2][0]
    assert twin[0] is not linear
    assert twin[0].weight is linear.weight


def test_tied_parameters_stay_tied() -> None:
    twin = twin_of(AWKWARD["tied_embedding"].build())
    assert twin.head.weight is twin.embed.weight


def test_non_persistent_buffers_stay_so() -> None:
    model = AWKWARD["buffers"].build()
    twin = twin_of(model)
    assert twin.mixing is model.mixing
    assert "mixing" not in twin.state_dict()
    twin.register_buffer("mixing", torch.ones(1), persistent=True)
    assert "mixing" not in model.state_dict()


class Holder(nn.Module):
    """Plain attributes that lead to modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.listed = [self.first, self.second, self.first]
        self.paired = (self.second, "a word")
        self.named = {"deep": [{"first": self.first}]}
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.listed:
            x = layer(x)
        return self.named["deep"][0]["first"](self.paired[0](x)) * self.scale


def test_plain_attributes_lead_to_the_twin() -> None:
    model = Holder()
    listed = model.listed
    twin = twin_of(model)
    assert twin.listed == [twin.first, twin.second, twin.first]
    assert twin.paired == (twin.second, "a word")
    assert twin.named == {"deep": [{"first": twin.first}]}
    assert model.listed is listed
    assert model.listed == [model.first, model.second, model.first]
    twin.listed.append(nn.Identity())
    assert len(model.listed) == 3


def test_plain_attributes_that_lead_to_themselves() -> None:
    model = Holder()
    model.listed.append(model.listed)  # type: ignore[arg-type]
    model.named["itself"] = model.named  # type: ignore[assignment]
    model.paired = (model.second, [])  # type: ignore[assignment]
    model.paired[1].append(model.paired)  # type: ignore[attr-defined]
    model.again = model.listed
    twin = twin_of(model)
    assert twin.listed[:3] == [twin.first, twin.second, twin.first]
    assert twin.listed[3] is twin.listed
    assert twin.again is twin.listed
    assert twin.listed is not model.listed
    assert twin.named["itself"] is twin.named
    assert twin.paired[0] is twin.second
    assert twin.paired[1][0] is twin.paired
    assert model.listed[3] is model.listed


def test_a_child_that_knows_its_parent_knows_the_twin() -> None:
    model = nn.Module()
    model.child = nn.Linear(2, 2)
    model.child.owner = [model]  # in a list, as authors do to avoid registering it
    twin = twin_of(model)
    assert twin.child.owner == [twin]


class ChoosesAtInit(nn.Module):
    """Its work is done by a method chosen when it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(16, 16), nn.Dropout(0.5)
        self.compute = self.with_dropout

    def with_dropout(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


class ForwardOnInstance(ChoosesAtInit):
    """Its ``forward`` is an attribute, as some wrapping libraries leave it."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.with_dropout  # type: ignore[method-assign]


@pytest.mark.parametrize("build", [ChoosesAtInit, ForwardOnInstance])
def test_bound_methods_are_the_twins(build: Callable[[], nn.Module]) -> None:
    """Else the model's own modules run, in the model's mode."""
    model = build().train()
    twin = twin_of(model)
    assert twin.compute.__self__ is twin
    x = normal(4, 16)
    assert torch.equal(twin(x), twin.linear(x))


def test_a_parametrized_module() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(16, 8)), nn.ReLU())
    before = snapshot(model)
    twin = twin_of(model)
    x = normal(3, 16)
    assert torch.equal(twin(x), model(x))
    originals = "0.parametrizations.weight.original0"
    assert twin.get_parameter(originals) is model.get_parameter(originals)
    assert snapshot(model) == before


def test_a_module_that_cannot_be_copied() -> None:
    model = AWKWARD["uncopyable"].build()
    twin = twin_of(model)
    assert twin.lock is model.lock
    assert torch.equal(twin(normal(2, 24, 16)), model(normal(2, 24, 16)))


def test_hooks_of_the_model_run_on_the_twin_and_new_ones_stay_there() -> None:
    model = AWKWARD["user_hooks"].build()
    twin = twin_of(model)
    x = normal(2, 24, 16)
    assert torch.equal(twin(x), model(x))
    called = []
    twin.l0.register_forward_hook(lambda *_: called.append("twin"))
    model.l1.register_forward_hook(lambda *_: called.append("model"))
    twin(x)
    assert called == ["twin"]
    model(x)
    assert called == ["twin", "model"]


def test_replace_puts_a_module_wherever_the_old_one_occurs() -> None:
    model = Holder()
    new = nn.Linear(4, 4)
    twin = twin_of(model, {model.first: new})
    assert twin.first is new
    assert twin.listed == [new, twin.second, new]
    assert twin.named["deep"][0]["first"] is new
    assert model.first is not new
    assert model.listed[0] is model.first


def test_a_replacement_is_left_as_it_is() -> None:
    model = small_cnn()
    new = nn.Sequential(nn.Dropout(0.5)).train()
    twin = twin_of(model, {model.block: new})
    assert twin.block is new
    assert new.training
    assert new[0].training


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_child_is_kept() -> None:
    scripted = torch.jit.script(nn.Linear(4, 4))
    model = nn.Sequential(scripted, nn.ReLU())
    twin = twin_of(model)
    assert twin[0] is scripted
    assert torch.equal(twin(normal(2, 4)), model(normal(2, 4)))


def test_children_that_are_none() -> None:
    model = nn.Module()
    model.register_module("absent", None)
    model.register_parameter("bias", None)
    twin = twin_of(model)
    assert twin.absent is None
    assert twin.bias is None
