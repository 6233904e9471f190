"""The log of ``autotune``: a run goes on from its own, and from no other."""

from __future__ import annotations

import json
import math
from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from autotuned import NETWORKS, agreement, bits, finite, many, tuned
from models import mlp, normal, seeded
from torch import nn

from torch_quant import (
    InvalidConfig,
    autotune,
)
from torch_quant.trials.journal import described


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed in the middle of an evaluation, and of a line."""
    log = tmp_path / "trials.jsonl"
    build, inputs = NETWORKS["mlp"]
    metric, calls = agreement(seeded(build), inputs(3)), []

    def count(candidate: nn.Module) -> float:
        calls.append(candidate)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return metric(candidate)

    with pytest.raises(KeyboardInterrupt):
        tuned("mlp", many(), eval_fn=count, log=log)
    with log.open("a") as file:
        file.write('{"of": "{')
    before = len(log.read_text().splitlines())
    found = tuned("mlp", many(), eval_fn=count, log=log)
    expected = tuned("mlp", many())
    assert len(calls) == 3 + 1 + expected.evaluations - 2  # two were known, one was broken off
    assert [each.metric for each in found] == [each.metric for each in expected]
    assert found.best.name == expected.best.name
    assert len(log.read_text().splitlines()) == before - 1 + expected.evaluations + 1 - 2
    again = len(calls)
    assert tuned("mlp", many(), eval_fn=count, log=log).best.name == expected.best.name
    assert len(calls) == again
    more = {**many(), "2 bits": bits(2)}  # a list that grew
    tuned("mlp", more, eval_fn=count, log=log)
    assert len(calls) <= again + 2


def test_logs_of_something_else(tmp_path: Path) -> None:
    log = tmp_path / "trials.jsonl"
    configurations = {"8": bits(8), "4": bits(4)}
    tuned("mlp", configurations, log=log)
    model = seeded(mlp, seed=1)
    data = [normal(32, 16, salt=0), normal(32, 16, salt=1)]
    options: dict[str, Any] = {"objective": "size", "backend": "reference", "progress": False}
    with pytest.raises(InvalidConfig, match="another model and another eval_fn; give"):
        autotune(model, configurations, data, lambda _: 1.0, log=log, **options)
    with pytest.raises(InvalidConfig, match="another data and another eval_fn; give"):
        autotune(seeded(mlp), configurations, data[:1], lambda _: 1.0, log=log, **options)
    log.write_text('{"what": 1}\n')
    with pytest.raises(InvalidConfig, match="is no log of autotune"):
        tuned("mlp", configurations, log=log)
    with pytest.raises(InvalidConfig, match="there is no folder"):
        tuned("mlp", configurations, log=tmp_path / "no" / "trials.jsonl")


def test_what_failed_is_asked_again(tmp_path: Path) -> None:
    """A metric, and a configuration, that work by now."""
    log = tmp_path / "trials.jsonl"
    answers = iter([math.nan, 1.0, 1.0])
    configurations = {"8": bits(8)}

    def metric(_: nn.Module) -> float:
        return next(answers)

    with pytest.raises(InvalidConfig, match="eval_fn gave nan for the float model"):
        tuned("mlp", configurations, eval_fn=metric, log=log)
    found = tuned("mlp", configurations, eval_fn=metric, log=log)
    assert found.best.name == "8"
    key = json.dumps(found.best.configuration, sort_keys=True)
    lines = log.read_text().splitlines()
    lines[1:] = [json.dumps({"of": key, "why_not": "BackendUnavailable: no compiler"}), lines[1]]
    log.write_text("\n".join(lines) + "\n")
    answers = iter([1.0, 1.0])
    (again,) = tuned("mlp", configurations, eval_fn=metric, log=log)
    assert not again.why_not
    assert again.passed


def test_another_function_or_model_has_another_log(tmp_path: Path) -> None:
    log = tmp_path / "trials.jsonl"
    configurations = {"8": bits(8)}
    tuned("mlp", configurations, eval_fn=finite, log=log)
    with pytest.raises(InvalidConfig, match="with another eval_fn; give another file"):
        tuned("mlp", configurations, log=log)
    model = seeded(mlp)
    model[1] = nn.Tanh()  # type: ignore[index]
    data = [normal(32, 16, salt=0), normal(32, 16, salt=1)]
    options: dict[str, Any] = {"objective": "size", "backend": "reference", "progress": False}
    with pytest.raises(InvalidConfig, match="with another model; give another file"):
        autotune(model, configurations, data, finite, log=log, **options)
    log.write_bytes(b"\x80\x81\n")
    with pytest.raises(InvalidConfig, match="is no log of autotune"):
        tuned("mlp", configurations, log=log)
    log.write_text('{"torch_qu')  # killed in the first line
    assert tuned("mlp", configurations, log=log).best.name == "8"


def test_data_is_known_by_its_values() -> None:
    x = np.arange(5000)
    other = x.copy()
    other[2500] += 1
    for one, two in ((x, other), (torch.from_numpy(x), torch.from_numpy(other))):
        assert described(one) != described(two)
        assert described({"a": [one, 1]}) == described({"a": [one, 1]})
        assert described(UserDict(a=one)) != described(UserDict(a=two))
    assert described(object()) == described(object())


def test_a_log_is_lines_of_json(tmp_path: Path) -> None:
    log = tmp_path / "trials.jsonl"
    tuned("mlp", {"8": bits(8)}, log=log)
    head, *rest = map(json.loads, log.read_text().splitlines())
    assert set(head) == {"torch_quant", "model", "data", "eval_fn"}
    assert [sorted(each) for each in rest] == [
        ["metric", "of", "seconds"], ["of", "size", "sqnr"], ["metric", "of", "seconds"],
    ]  # fmt: skip
