"""The promises of the design, over every registered backend and observer."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from flows import (
    BACKENDS,
    CASES,
    EVERY_BACKEND,
    QUICK,
    assert_unchanged,
    calibrated,
    run,
    settled,
    snapshot,
)
from models import MODELS, example
from thinning import some
from torch import nn

from torch_quant import Backend, ModuleFilter, QConfig, Quantizer, QuantPlan, QuantSpec, sqnr
from torch_quant.statistics import OBSERVERS

SOME = ["mlp", "small_cnn", "mobile_cnn", "tiny_transformer", "attention_explicit"]


def batches(name: str, sizes: tuple[int, ...] = (32, 64)) -> list[Any]:
    return [(example(name, size), {}) for size in sizes]


@pytest.mark.thin
@pytest.mark.parametrize("observer", sorted(OBSERVERS))
@pytest.mark.parametrize("name", SOME)
def test_1_calib_output_is_the_float_output(name: str, observer: str) -> None:
    model = MODELS[name]()
    calib_model = Quantizer("reference", qconfig=QConfig(observer=observer)).calib(model)
    for size in (1, 4, 7):
        assert torch.equal(calib_model(*example(name, size)), model(*example(name, size)))


@pytest.mark.thin
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SOME)
def test_2_the_model_is_untouched(name: str, backend: str) -> None:
    model = MODELS[name]().train()
    model.requires_grad_(True)
    before = snapshot(model)
    quantizer = calibrated(model, batches(name), backend=backend)
    quant_model = quantizer.quantize(model)
    quant_model(*example(name, 3))
    quantizer.coverage(model)
    assert_unchanged(model, before)
    assert model.training


@pytest.mark.thin
@pytest.mark.parametrize("backend", some(EVERY_BACKEND, *QUICK))
@pytest.mark.parametrize("name", SOME)
def test_4_a_backend_is_as_good_as_its_simulation(name: str, backend: str) -> None:
    from torch_quant.backends import ReferenceBackend

    model = MODELS[name]()
    quantizer = calibrated(model, batches(name), backend=backend)
    x = example(name, 16)
    expected = model(*x)
    simulated = quantizer.quantize(model, backend=ReferenceBackend(Backend.get(backend)))
    real = quantizer.quantize(model)
    assert sqnr(expected, real(*x)) >= sqnr(expected, simulated(*x)) - 0.5


@pytest.mark.thin
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SOME)
def test_5_save_and_load(name: str, backend: str) -> None:
    model = MODELS[name]()
    quantizer = calibrated(model, batches(name), backend=backend)
    quant_model = quantizer.quantize(model)
    x = example(name, 3)
    expected = quant_model(*x)
    assert torch.equal(copy.deepcopy(quant_model)(*x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(quant_model))(*x), expected)

    buffer = io.BytesIO()
    torch.save(quantizer.state_dict(), buffer)
    buffer.seek(0)
    other = Quantizer(backend)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    again = other.quantize(model, example_inputs=example(name, 2))
    assert torch.equal(again(*x), expected)

    buffer = io.BytesIO()
    traced = torch.jit.freeze(torch.jit.trace(quant_model, example(name, 2)).eval())
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    assert torch.equal(settled(torch.jit.load(buffer), x), settled(traced, x))
    assert torch.equal(settled(traced, x), expected)

    sizes = tuple({0: torch.export.Dim.AUTO} for _ in x)
    program = torch.export.export(quant_model, example(name, 2), dynamic_shapes=sizes, strict=False)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    exported = torch.export.load(buffer).module()(*x)
    if Backend.get(backend).compiles:  # not what its compiler reads: the same graph in float
        assert sqnr(expected, exported) > 30
    else:
        assert torch.equal(exported, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_5_the_plan_survives_json(backend: str) -> None:
    model = MODELS["small_cnn"]()
    quantizer = calibrated(model, batches("small_cnn"), backend=backend)
    quantizer.quantize(model)
    plan = QuantPlan.from_dict(json.loads(json.dumps(quantizer.plan.to_dict())))
    assert dict(plan) == dict(quantizer.plan)


@pytest.mark.parametrize("name", SOME)
def test_6_one_batch_or_many(name: str) -> None:
    model = MODELS[name]()
    whole = calibrated(model, batches(name, (16,)), backend="reference")
    split = Quantizer("reference")
    calib_model = split.calib(model)
    for rows in zip(*(x.split(3) for x in example(name, 16)), strict=True):
        calib_model(*rows)
    spec = QuantSpec()
    for key in whole.state.statistics:
        if key.endswith("probabilities"):
            continue  # products of different batch sizes may be summed in another order
        for x, y in zip(
            *(each.state.find(key).range(spec) for each in (whole, split)), strict=True
        ):
            # The ranges of a tensor computed by other kernels for another batch size.
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_6_calibrating_more_is_never_ignored() -> None:
    model = MODELS["mlp"]()
    quantizer = calibrated(model, batches("mlp"), backend="reference")
    x = example("mlp", 4)
    first = quantizer.quantize(model)(*x)
    quantizer.calib(model)(100.0 * x[0])
    assert not torch.equal(quantizer.quantize(model)(*x), first)


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
def test_7_memory_does_not_grow_with_the_data(observer: str) -> None:
    model = MODELS["small_cnn"]()
    quantizer = Quantizer("reference", qconfig=QConfig(observer=observer))
    calib_model = quantizer.calib(model)

    def size() -> int:
        buffer = io.BytesIO()
        torch.save(quantizer.state_dict(), buffer)
        return len(buffer.getvalue())

    calib_model(*example("small_cnn", 8))
    before = size()
    for _ in range(20):
        calib_model(*example("small_cnn", 8))
    assert abs(size() - before) < 2048  # the pickled batch counts grow by a few digits


@pytest.mark.parametrize("backend", some(EVERY_BACKEND, *QUICK))
def test_8_excluded_ops_compute_with_the_same_values(backend: str) -> None:
    model = MODELS["mlp"]()
    quantizer = calibrated(
        model, batches("mlp"), backend=backend, module_filter=ModuleFilter(exclude_names="4")
    )
    quant_model = quantizer.quantize(model)
    kept = [x for x in quant_model.state_dict().values() if x.dtype == torch.float32]
    last = model[4]
    assert isinstance(last, nn.Linear)
    for x in (last.weight, last.bias):
        assert any(torch.equal(x, y) for y in kept)
        assert all(x.data_ptr() != y.data_ptr() for y in kept)
    assert quantizer.plan["4"].reason == "excluded by name"


@pytest.mark.parametrize("backend", some(EVERY_BACKEND, *QUICK))
def test_8_with_everything_but_one_excluded_only_that_one_errs(backend: str) -> None:
    model = MODELS["mlp"]()
    quantizer = calibrated(
        model, batches("mlp"), backend=backend, module_filter=ModuleFilter(include_names="0")
    )
    quant_model = quantizer.quantize(model)
    assert quantizer.plan.quantized == ("0",)
    x = example("mlp", 3)
    assert 20 < sqnr(model(*x), quant_model(*x)) < float("inf")


@pytest.mark.thin
@pytest.mark.parametrize("backend", some(EVERY_BACKEND, *BACKENDS))  # see test_in_process
@pytest.mark.parametrize("name", ["branch_on_data", "cache_argument", "routed_experts"])
def test_pieces_are_copied_and_pickled(name: str, backend: str) -> None:
    case = CASES[name]
    model = case.build()
    quant_model = calibrated(model, case.ones(), backend=backend).quantize(model)
    expected = run(quant_model, case.inputs(2))
    again = run(copy.deepcopy(quant_model), case.inputs(2))
    assert sqnr(expected, again) == float("inf")
