"""Captures that tests share leave the tests independent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capturing_once import content, exported_anew
from flows import calibrated
from models import MODELS, example
from thinning import some
from torch import Tensor, nn

from torch_quant import Quantizer
from torch_quant.graph import capture, widen
from torch_quant.graph.calls import flatten_call
from torch_quant.graph.running import no_fastpath


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that are really exported, by class."""
    made: list[str] = []
    export = widen.export_graph

    def noted(module: nn.Module, *args: Any, **options: Any) -> Any:
        made.append(type(module).__name__)
        return export(module, *args, **options)

    monkeypatch.setattr(widen, "export_graph", noted)
    return made


@pytest.mark.parametrize("name", some(sorted(MODELS), "mlp", "tiny_transformer"))
def test_a_shared_export_is_as_good_as_a_new_one(name: str, exports: list[str]) -> None:
    batches = [(example(name, 4), {})]
    models = [MODELS[name]() for _ in range(3)]
    calibrated(models[0], batches, backend="reference")
    first = len(exports)
    with torch.no_grad():  # what becomes of the first model is nothing to the second
        for parameter in models[0].parameters():
            parameter.zero_()
    second = calibrated(models[1], batches, backend="reference")
    assert len(exports) == first  # at most what no test before has exported
    new = Quantizer(backend="reference")
    with exported_anew():
        new.calib(models[2])(*batches[0][0])
    assert len(exports) > first

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


class Writing(nn.Module):
    """Leaves something behind, which the next export must leave too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, seen: dict[str, Tensor]) -> Tensor:
        seen["x"] = self.linear(x)
        return seen["x"] + 1


def test_what_writes_is_exported_each_time(exports: list[str]) -> None:
    for turn in (1, 2):
        torch.manual_seed(0)
        seen: dict[str, Tensor] = {}
        Quantizer(backend="reference").calib(Writing())(torch.ones(2, 4), seen)
        assert seen.keys() == {"x"}
        assert len(exports) == turn


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
    with no_fastpath():  # which is our own, and not what a user asked for
        assert key() == keys[0]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert key() not in keys
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_other_options_are_exported_anew(exports: list[str]) -> None:
    model, call = MODELS["mlp"](), flatten_call(example("mlp", 4), {})
    next(model.parameters()).view(-1)[0] += 2  # which no other test has exported

    def export(path: str, free: list[frozenset[int]] | None) -> None:
        capture.export_call(model, call, path=path, free=lambda call: free)

    for count, options in enumerate([("", None), ("inner", None), ("", [frozenset({0})])], start=1):
        for _ in range(2):
            export(*options)
            assert len(exports) == count


def test_a_class_that_only_one_function_knows_is_exported_each_time(exports: list[str]) -> None:
    class Own(nn.Linear):
        pass

    for turn in (1, 2):
        torch.manual_seed(0)
        Quantizer(backend="reference").calib(nn.Sequential(Own(8, 8), nn.ReLU()))(torch.ones(2, 8))
        assert len(exports) == turn
