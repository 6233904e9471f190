"""Saved states: whatever is wrong in one, it is refused by name, and nothing changes."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flows import calibrated
from models import MODELS, example, normal
from torch import Tensor, nn

from torch_quant import InvalidConfig, PerChannel, QConfig, Quantizer, QuantSpec
from torch_quant.statistics import OBSERVERS, RANGE, MinMaxObserver, Observer

Path = tuple[str, ...]

WRONG: dict[str, Any] = {
    "none": None, "bool": True, "negative": -1, "fraction": 1.5, "list": [1, 2], "dict": {"a": 1},
    "scalar nan": torch.tensor(math.nan), "ints": torch.zeros(3, dtype=torch.int32),
    "matrix": torch.zeros(2, 2), "empty": torch.zeros(0), "bytes": b"x",
}  # fmt: skip
FITS = {
    ("momentum", "fraction"),
    ("weights", "dict"),
}  # fmt: skip
"""Of the right kind after all, by the last part of the path; not all of it is accepted there."""


def saved() -> dict[str, Any]:
    """A state with every observer, per tensor and per channel, and layers in float."""
    model = MODELS["mlp"]()
    names = sorted(OBSERVERS)
    batches = [(example("mlp", 32), {})]
    quantizer = calibrated(model, batches, backend="reference", qconfig=QConfig())
    quantizer.fallen_back = {"2": "float32", "4": "bfloat16"}
    for name in names:
        for axis in (None, -1):
            observer = OBSERVERS[name](None if axis is None else PerChannel(axis))
            observer.observe(normal(64, 3))
            quantizer.state.put(f"{name} {axis}", RANGE, observer)
    return quantizer.state_dict()


STATE = saved()


def paths(value: Any, at: Path = ()) -> Iterator[Path]:
    yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*at, key))


def at(state: Any, path: Path) -> Any:
    for key in path:
        state = state[key]
    return state


def facts(quantizer: Quantizer) -> Any:
    """All that a state holds, tensors as lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return value.tolist() if isinstance(value, Tensor) else value

    return plain(quantizer.state_dict()), quantizer.state.version, dict(quantizer.plan)


@functools.cache
def holding_another() -> Quantizer:
    model = MODELS["mlp"]()
    quantizer = calibrated(model, [(example("mlp", 8), {})], backend="reference")
    quantizer.quantize(model)
    return quantizer


def assert_refused(state: Any) -> str:
    """With the message; a quantizer that holds another state keeps it."""
    quantizer = holding_another()
    before = facts(quantizer)
    with pytest.raises(InvalidConfig) as info:
        quantizer.load_state_dict(state)
    assert facts(quantizer) == before
    return str(info.value)


@pytest.mark.parametrize("path", list(paths(STATE))[1:], ids="/".join)
def test_every_entry_of_the_wrong_kind_is_refused_whole(path: Path) -> None:
    for name, wrong in WRONG.items():
        if (path[-1], name) in FITS:
            continue
        state = copy.deepcopy(STATE)
        at(state, path[:-1])[path[-1]] = wrong
        message = assert_refused(state)
        assert path[-1] in message or path[-2] in message, (name, message)


@pytest.mark.parametrize(
    "path",
    [p for p in list(paths(STATE))[1:] if p[0] == "state" and "weights" not in p and len(p) != 3]
    + [("model",)],
    ids="/".join,
)
def test_every_entry_that_is_missing_is_named(path: Path) -> None:
    state = copy.deepcopy(STATE)
    del at(state, path[:-1])[path[-1]]
    if path[-1] == "granularity":  # without it, the statistics are those of a whole tensor
        assert "min_val" in assert_refused(state)
    else:
        assert path[-1] in assert_refused(state)


@pytest.mark.parametrize("path", [p for p in paths(STATE) if isinstance(at(STATE, p), dict)])
def test_every_entry_too_many_is_named(path: Path) -> None:
    named = {("model",), ("fallback",), ("state", "statistics"), ("state", "weights")}
    if path in named:  # any name may be a key, but not any key a name
        state = copy.deepcopy(STATE)
        at(state, path)[7] = next(iter(at(STATE, path).values()))
        assert "7" in assert_refused(state)
        return
    state = copy.deepcopy(STATE)
    at(state, path)["surplus"] = 1
    assert "surplus" in assert_refused(state)


@pytest.mark.parametrize("state", [None, 5, "x", [], STATE["state"], {}], ids=repr)
def test_what_is_no_state_at_all(state: Any) -> None:
    assert "not a Quantizer state" in assert_refused(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["minmax None"]["range"].update(min_val=torch.tensor(9.0)),
            "above",
        ),
        (
            lambda s: s["minmax -1"]["range"].update(min_val=torch.zeros(4)),
            "'max_val'",
        ),
        (lambda s: s["histogram -1"]["range"]["counts"].neg_(), "negative counts"),
        (lambda s: s["entropy -1"]["range"]["first"].add_(9), "cover"),
        (lambda s: s["entropy -1"]["range"]["level"].sub_(1), "cover"),
        (
            lambda s: s["percentile None"]["range"]["level"].add_(5000),
            "percentile None",
        ),
        (lambda s: s["moving_average -1"]["range"].update(momentum=1.5), "momentum"),
        (
            lambda s: s["minmax None"]["range"].update(statistic="magic"),
            "unknown statistic",
        ),
    ],
)
def test_contradictions(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    state = copy.deepcopy(STATE)
    change(state["state"]["statistics"])
    assert message in assert_refused(state)


def test_no_batches_but_data() -> None:
    state = copy.deepcopy(STATE)
    state["state"]["batches"] = 0
    assert "batches" in assert_refused(state)


def test_an_unknown_precision_is_refused() -> None:
    assert "'float16'" in assert_refused(STATE | {"fallback": {"2": "float16"}})


def test_what_was_saved_is_what_is_loaded() -> None:
    quantizer = Quantizer("reference")
    quantizer.load_state_dict(copy.deepcopy(STATE))
    other = Quantizer("reference")
    other.load_state_dict(quantizer.state_dict())
    assert facts(other) == facts(quantizer)


def test_a_state_of_version_1() -> None:
    """It says no version, and names the axis of channels; their statistics had one dimension."""
    old = copy.deepcopy(STATE)
    del old["state"]["version"]
    old["state"]["observers"] = {}
    for key, kept in old["state"].pop("statistics").items():
        observer = old["state"]["observers"][key] = kept["range"]
        observer["observer"] = observer.pop("statistic")
        if observer.pop("granularity", None):
            observer["ch_axis"] = -1
            observer |= {end: observer[end].flatten() for end in ("min_val", "max_val")}
    quantizer, expected = Quantizer("reference"), Quantizer("reference")
    quantizer.load_state_dict(old)
    expected.load_state_dict(STATE)
    for name, kept in quantizer.state.statistics.items():
        observer = kept[RANGE]
        assert isinstance(observer, Observer)
        spec = QuantSpec.of(granularity=observer.granularity)
        ours, theirs = (q.state.qparams(name, spec) for q in (quantizer, expected))
        assert torch.equal(ours.scale.flatten(), theirs.scale.flatten())
    channels = quantizer.state.find("minmax -1")
    assert isinstance(channels, MinMaxObserver)
    before = channels.min_val
    channels.observe(-9 * torch.ones(2, 5, 3))
    assert (channels.min_val.flatten() < before).all()


@pytest.mark.parametrize("version", [0, 4, True, "2", None])
def test_another_version_is_refused(version: Any) -> None:
    assert "version" in assert_refused(STATE | {"state": STATE["state"] | {"version": version}})


def test_a_state_from_before_weights_were_noted() -> None:
    state = copy.deepcopy(STATE)
    del state["state"]["weights"]
    Quantizer("reference").load_state_dict(state)


# ---- of which weights


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "weights" in r.getMessage()]


def test_ranges_of_other_weights_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = MODELS["mlp"]()
    state = calibrated(model, [(example("mlp", 8), {})], backend="reference").state_dict()
    for layer in (model[0], model[2]):
        layer.weight.mul_(1.01)
    quantizer = Quantizer("reference")
    quantizer.load_state_dict(state)
    for _ in range(2):
        quantizer.quantize(model, example_inputs=example("mlp", 8))
    (message,) = told(caplog)
    assert "0.weight and 1 more changed" in message


@pytest.mark.parametrize("change", ["in place", "by data", "replaced", "a batch norm"])
def test_weights_that_change_after_calibration(
    change: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    quantizer = calibrated(model, [((normal(2, 3, 8, 8),), {})], backend="reference")
    quantizer.quantize(model)
    assert not told(caplog)
    if change == "in place":
        model[0].weight.add_(0.1)
    elif change == "by data":
        model[0].weight.data += 0.1
    elif change == "replaced":
        model[0].weight = nn.Parameter(model[0].weight + 0.1)
    else:
        model[1].running_var.mul_(2.0)
    quantizer.quantize(model)
    quantizer.quantize(model)
    name = "1.running_var" if change == "a batch norm" else "0.weight"
    assert [name in message for message in told(caplog)] == [True]


def test_the_same_weights_in_other_tensors_are_the_same(caplog: pytest.LogCaptureFixture) -> None:
    model = MODELS["mlp"]()
    quantizer = calibrated(model, [(example("mlp", 8), {})], backend="reference")
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    quantizer.calib(model)(*example("mlp", 8))
    quantizer.quantize(model)
    assert not told(caplog)


def test_weights_that_change_while_calibrating(caplog: pytest.LogCaptureFixture) -> None:
    model = MODELS["mlp"]()
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        calib_model(*example("mlp", 8))
        model[0].weight.mul_(2.0)
        calib_model(*example("mlp", 8))
        calib_model(*example("mlp", 8))
    (message,) = told(caplog)
    assert "the ranges mix both" in message
