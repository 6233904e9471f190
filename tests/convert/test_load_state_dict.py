"""A quantized model takes the ``state_dict`` of another one with the same graphs, and no other."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import BACKENDS, assert_unchanged, calibrated, snapshot
from torch import Tensor, nn

import torch_quant
from torch_quant import InvalidConfig, QConfig, Quantizer, recipes
from torch_quant.convert.formats import Formats

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8)).eval()


def quantized(seed: int = 0, backend: str = "reference", x: Tensor = X, **options: Any) -> Any:
    model = network(seed)
    options.setdefault("qconfig", recipes.int8_static(smooth=None))  # graphs of the same sizes
    quantizer = Quantizer(backend, **options)
    quantizer.calib(model)(x)
    return quantizer.quantize(model)


def assert_takes(ours: nn.Module, theirs: nn.Module, **options: Any) -> None:
    assert not torch.equal(ours(X), theirs(X))
    ours.load_state_dict(theirs.state_dict(), **options)
    assert torch.equal(ours(X), theirs(X))


@pytest.mark.parametrize("assign", [False, True])
def test_scales_and_integers_go_over(assign: bool) -> None:
    assert_takes(quantized(0), quantized(1, x=X * 3), assign=assign)


@pytest.mark.parametrize("backend", sorted({"reference", "onednn"} & set(BACKENDS)))
@pytest.mark.parametrize("recipe", ["int4_weight_only", "int8_dynamic"])
def test_formats_whose_graphs_hold_no_scales(backend: str, recipe: str) -> None:
    made = recipes.int8_dynamic() if recipe == "int8_dynamic" else recipes.int8_weight_only()
    options: dict[str, Any] = {"qconfig": made, "capture": "modules"}
    assert_takes(*(quantized(seed, backend, **options) for seed in (0, 1)))


def test_keys_are_tensors_alone_and_files_keep_what_they_are_of(tmp_path: Path) -> None:
    ours, theirs = quantized(0), quantized(1)
    state = theirs.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    assert {name for name in state if "weight" in name} >= {"0.weight", "0.weight_scale"}
    torch.save(state, tmp_path / "state.pt")
    ours.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(ours(X), theirs(X))


def test_copies_pickles_and_saved_models_load_and_are_loaded(tmp_path: Path) -> None:
    theirs = quantized(1)
    torch_quant.save(quantized(0), tmp_path / "model")
    for ours in (
        copy.deepcopy(quantized(0)),
        pickle.loads(pickle.dumps(quantized(0))),
        torch_quant.load(tmp_path / "model", network(0)),
    ):
        before = copy.deepcopy(ours)
        assert_takes(ours, theirs)
        theirs_again = quantized(2)
        theirs_again.load_state_dict(before.state_dict())
        assert torch.equal(theirs_again(X), before(X))


def test_a_module_around_and_a_part_of_it() -> None:
    ours, theirs = quantized(0), quantized(1)
    around, other = (nn.ModuleDict({"body": x, "head": nn.Linear(8, 2)}) for x in (ours, theirs))
    around.load_state_dict(other.state_dict())
    assert torch.equal(ours(X), theirs(X))
    assert torch.equal(around["head"].weight, other["head"].weight)
    again = quantized(2)
    again[0].load_state_dict(theirs[0].state_dict())
    assert torch.equal(again.state_dict()["0.weight"], theirs.state_dict()["0.weight"])


def refused(module: nn.Module, state: Any, match: str) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for options in ({}, {"strict": False}, {"assign": True}):
        with pytest.raises(InvalidConfig, match=match):
            nn.Module.load_state_dict(module, state, **options)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_do_not_say_their_formats(backend: str) -> None:
    model = network(0)
    before = snapshot(model)
    quant_model = calibrated(model, [((X,), {})], backend=backend).quantize(model)
    around = nn.ModuleDict({"body": quant_model, "head": nn.Linear(8, 2)})
    for module in (quant_model, around):
        changed = {name: -value for name, value in module.state_dict().items()}
        refused(module, changed, "compiles its kernels|does not say which formats")
        refused(module, OrderedDict(changed), "compiles its kernels|does not say which formats")
    state = quant_model.graphs[0].state_dict()
    refused(quant_model.graphs[0], state, "a graph takes no state_dict")
    assert_unchanged(model, before)


def test_other_formats_of_equal_sizes_are_named() -> None:
    """int4 codes lie in int8 tensors, uint8 and int8 activations have scales of one shape."""
    ours = quantized(0)
    weights = QConfig(weight=torch_quant.QuantSpec.of(
        bits=4, signed=True, symmetric=True, per_channel=True
    ))  # fmt: skip
    refused(ours, quantized(1, qconfig=weights).state_dict(), r"other formats: 0 is .*; expected")
    left_out = quantized(1, overrides={"2": None})
    refused(ours, left_out.state_dict(), r"other formats: 2 is float there; expected")
    inputs = QConfig(torch_quant.QuantSpec.of(signed=True, symmetric=True))
    refused(ours, quantized(1, qconfig=inputs).state_dict(), "other (formats|graphs)")


def test_another_model_is_named_by_where_it_differs() -> None:
    def stack(width: int, depth: int) -> Any:
        layers = [nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8)) for _ in range(depth)]
        int8 = recipes.int8_weight_only()
        quantizer = Quantizer("reference", qconfig=int8, capture="modules")
        return quantizer.quantize(nn.Sequential(*layers).eval(), example_inputs=(X,))

    ours = stack(16, 2)
    refused(ours, stack(16, 3).state_dict(), r"of another model: it has 2\.0\.")
    refused(ours, stack(16, 1).state_dict(), r"of another model: it lacks 1\.0\.")
    wider = r"of another model: 0\.0\.bias is \(24,\) there; expected \(16,\)\."
    refused(ours, stack(24, 2).state_dict(), wider)
    assert_takes(ours, stack(16, 2))


@pytest.mark.skipif("onednn" not in BACKENDS, reason="Backend.ONEDNN needs an x86 CPU")
def test_scales_that_are_numbers_in_the_graphs() -> None:
    ours = quantized(0, "onednn")
    refused(ours, quantized(0, "onednn", x=X * 3).state_dict(), "of other graphs, at the root")
    refused(ours, quantized(0, "reference").state_dict(), "reference there, onednn here")
    same = quantized(0, "onednn")
    same.load_state_dict(ours.state_dict())
    assert torch.equal(ours(X), same(X))


def test_weights_that_are_the_float_models_too() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4096)).eval()
    before = snapshot(model)
    quantizer = Quantizer("reference", overrides={"1": None})
    quantizer.calib(model)(X)
    quant_model = quantizer.quantize(model, share_float_weights=True)
    refused(quant_model, quant_model.state_dict(), "shares weights with the float model")
    assert_unchanged(model, before)


def test_calls_of_other_kinds_are_not_captured_with_old_values() -> None:
    model, wide = network(0), torch.randn(2, 3, 4, 8)
    quantizer = Quantizer("reference")
    quantizer.calib(model)(X)
    assert quantizer.quantize(model)(wide).shape == wide.shape
    quant_model = quantizer.quantize(model)
    quant_model.load_state_dict(quantized(1).state_dict())
    with pytest.raises(torch_quant.CaptureFailed, match="values of a state_dict"):
        quant_model(wide)


def test_a_head_beside_a_quantized_model_loads_its_own_values() -> None:
    around = nn.ModuleDict({"body": quantized(0), "head": nn.Linear(8, 2)})
    head = {f"head.{name}": value + 1 for name, value in around["head"].state_dict().items()}
    around.load_state_dict(head, strict=False)
    assert torch.equal(around["head"].bias, head["head.bias"])
    with pytest.raises(RuntimeError, match="Missing key"):
        around.load_state_dict(head)


def test_formats_pickled_by_an_earlier_version() -> None:
    formats = Formats("onednn", {"up": "int8"})
    state = {name: value for name, value in vars(formats).items() if name != "lower"}
    old = Formats.__new__(Formats)
    old.__setstate__(state)
    assert old == formats
    assert old.inside("up", lower=True) == []
    assert pickle.loads(pickle.dumps(formats)) == formats
