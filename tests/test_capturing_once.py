"""Captures that tests share leave the tests independent."""

from __future__ import annotations

import pytest
import torch
from capturing_once import content, restore
from flows import calibrated
from models import MODELS, example

from torch_quant import Quantizer


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_restored_capture_is_as_good_as_a_new_one(name: str) -> None:
    batches = [(example(name, 4), {})]
    models = [MODELS[name]() for _ in range(3)]
    calibrated(models[0], batches, backend="reference")
    with torch.no_grad():  # what becomes of the first model is nothing to the second
        for parameter in models[0].parameters():
            parameter.zero_()
    second = calibrated(models[1], batches, backend="reference")
    new = Quantizer(backend="reference")
    new.calib(models[2])(*batches[0][0])

    graphs = second.calib(models[1]).captured.root.graphs
    own = {id(x) for x in (*models[1].parameters(), *models[1].buffers())}
    for _, graph in graphs:
        held = [*graph.gm.parameters(), *graph.gm.buffers()]
        assert {id(x) for x in held} & own
        assert not any(
            id(x) == id(y) for x in held for y in (*models[0].parameters(), *models[0].buffers())
        )
    x = example(name, 3)
    assert torch.equal(second.calib(models[1])(*x), new.calib(models[2])(*x))
    assert second.calib(models[1]).captured.root.graphs == graphs  # captured no more
    assert torch.equal(second.quantize(models[1])(*x), new.quantize(models[2])(*x))


def test_what_differs_is_captured_anew() -> None:
    def key(**changes: bool) -> bytes | None:
        model, batches = MODELS["mlp"](), [(example("mlp", 4 + changes.get("batch", False)), {})]
        if changes.get("value"):
            next(model.parameters()).view(-1)[0] += 1
        if changes.get("attribute"):
            model.extra = 1
        if changes.get("training"):
            model.train()
        if changes.get("frozen"):
            model.requires_grad_(False)
        return content(model, batches)

    keys = [
        key(),
        *(key(**{c: True}) for c in ("batch", "value", "attribute", "training", "frozen")),
    ]
    assert key() == keys[0]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    with torch.enable_grad():
        assert key() not in keys


def test_a_class_that_only_one_function_knows_is_captured_each_time() -> None:
    class Own(torch.nn.Linear):
        pass

    model = Own(8, 8)
    key = content(model, [])
    assert key is None
    assert not restore(key, Quantizer(backend="reference").calib(model).captured.root)
