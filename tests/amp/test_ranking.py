"""The ranking: its order, what it predicts, and that it is plain data."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from torch_quant import QuantError
from torch_quant.amp.gram import NoiseGram
from torch_quant.amp.ranking import METRICS, Ranking, Sensitivity, decibels
from torch_quant.amp.records import Recorder, SiteStats


def site(name: str, score: float, **options: Any) -> Sensitivity:
    values: dict[str, Any] = {
        "op": "linear",
        "gain": score,
        "local_sqnr": 30.0,
        "predicted_output_sqnr": decibels(100.0, score),
        "weight_share": 0.25,
        "activation_share": 0.75,
        "macs": 10,
        "bytes": 40,
    }
    return Sensitivity(name=name, score=score, **values | options)


def diagonal(**scores: float) -> NoiseGram:
    """Noises that have nothing to do with each other."""
    count = len(scores)
    effects = {
        name: math.sqrt(score) * torch.eye(count, dtype=torch.float64)[i]
        for i, (name, score) in enumerate(scores.items())
    }
    return NoiseGram.of(effects, count)


SCORES = {"a": 2.0, "b": 5.0, "c": 0.0, "d": 3.0}


def ranking(**options: Any) -> Ranking:
    values: dict[str, Any] = {"gram": diagonal(**SCORES), "output_signal": 1000.0, "batches": 3}
    sites = [site(name, score) for name, score in SCORES.items()]
    return Ranking(sites, "output", **values | options)


def test_worst_first() -> None:
    found = ranking()
    assert found.names == ["b", "d", "a", "c"]
    assert [s.score for s in found] == [5.0, 3.0, 2.0, 0.0]
    assert len(found) == 4
    assert found[0].name == "b"
    assert [s.name for s in found[1:3]] == ["d", "a"]
    assert found[-1].name == "c"
    assert found.of("d") is found[1]
    assert found.groups == [("b",), ("d",), ("a",), ("c",)]
    with pytest.raises(KeyError):
        found.of("e")
    with pytest.raises(IndexError):
        found[4]


def test_sites_of_a_group_count_together() -> None:
    """``a`` and ``d`` have 5.5 together, more than ``b`` alone."""
    sites = [
        site("a", 2.5, together=("d",)),
        site("b", 5.0),
        site("c", 0.0),
        site("d", 3.0, together=("a",)),
    ]
    found = Ranking(sites, "output", diagonal(a=2.5, b=5.0, c=0.0, d=3.0), 1000.0)
    assert found.groups == [("d", "a"), ("b",), ("c",)]
    assert found.names == ["d", "a", "b", "c"]
    assert len(found.curve()) == 4


def test_equal_scores_are_in_a_fixed_order() -> None:
    sites = [site(name, 1.0) for name in "dbca"]
    names = Ranking(sites, "output", None, 100.0).names
    assert Ranking(sites[::-1], "output", None, 100.0).names == names == ["a", "b", "c", "d"]


def test_what_is_left() -> None:
    sites = [site(n, s, fallen_back=n in "bc") for n, s in SCORES.items()]
    assert Ranking(sites, "output", diagonal(**SCORES), 1000.0).left == [("d",), ("a",)]
    assert ranking().left == ranking().groups


def test_noise_and_prediction() -> None:
    found = ranking()
    assert found.noise() == pytest.approx(10.0)
    assert found.noise(["b"]) == pytest.approx(5.0)
    assert found.noise(["b", "d", "a"]) == 0.0
    assert found.predicted() == pytest.approx(20.0)
    assert found.predicted(["b"]) == pytest.approx(10.0 * math.log10(200.0))
    assert found.predicted("abcd") == math.inf
    assert found.predicted(iter("abcd")) == math.inf  # any iterable, read once


def test_the_curve_of_independent_noises_never_falls() -> None:
    points = ranking().curve()
    assert [count for count, _ in points] == [0, 1, 2, 3, 4]
    values = [value for _, value in points]
    assert values == sorted(values)
    assert values[0] == pytest.approx(20.0)
    assert values[-1] == math.inf


def test_without_a_matrix_scores_add_up() -> None:
    found = Ranking([site(n, s) for n, s in SCORES.items()], "sqnr", None)
    assert found.noise() == pytest.approx(10.0)
    assert found.noise(["b", "a"]) == pytest.approx(3.0)
    assert math.isnan(found.predicted())
    assert all(math.isnan(value) for _, value in found.curve())


def test_a_loss_predicts_no_sqnr() -> None:
    found = Ranking([site("a", 1.0)], "loss", diagonal(a=1.0), 10.0)
    assert math.isnan(found.predicted())


def test_an_empty_ranking() -> None:
    found = Ranking([], "output", NoiseGram(), 10.0)
    assert found.names == found.groups == found.left == []
    assert found.curve() == [(0, math.inf)]


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [
        (100.0, 1.0, 20.0),
        (1.0, 0.0, math.inf),
        (0.0, 1.0, -math.inf),
        (0.0, 0.0, math.inf),
    ],
)
def test_decibels(signal: float, noise: float, expected: float) -> None:
    assert decibels(signal, noise) == pytest.approx(expected)


def test_plain_values() -> None:
    sites = [
        site("a", 2.0, together=("b",), shares_input=("c",)),
        site("b", 1.0, together=("a",), local_sqnr=math.inf, predicted_output_sqnr=-math.inf),
        site("c", 0.5, predicted_output_sqnr=None),
    ]
    found = Ranking(sites, "output", diagonal(a=2.0, b=1.0, c=0.5), 10.0, 7, "a note")
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["metric"] == "output"
    assert data["meaning"] == METRICS["output"]
    assert data["batches"] == 7
    assert data["note"] == "a note"
    assert [each["name"] for each in data["sites"]] == ["a", "b", "c"]
    first, second, third = data["sites"]
    assert first["together"] == ["b"]
    assert first["shares_input"] == ["c"]
    assert (first["score"], first["macs"], first["bytes"]) == (2.0, 10, 40)
    assert second["local_sqnr"] is None
    assert second["predicted_output_sqnr"] is None
    assert third["predicted_output_sqnr"] is None


# ---- the records that rankings come from


def recorded(value: float) -> Recorder:
    recorder = Recorder()
    with recorder.batch() as record:
        record.of("a").signal = value
        record.of("a").noise = 0.5
        record.gram = diagonal(a=2.0)
        record.output_signal = 9.0
    return recorder


def test_a_record_adds_up() -> None:
    recorder = recorded(3.0)
    with recorder.batch() as record:
        record.of("a").signal = 4.0
        record.of("b").reached = True
    assert recorder.batches == 2
    assert recorder.sites["a"] == SiteStats(signal=7.0, noise=0.5)
    assert recorder.sites["b"].reached
    assert recorder.output_signal == 9.0
    assert recorder.gram.of_site("a") == pytest.approx(2.0)


class Failed(Exception):
    pass


def spoil(recorder: Recorder, field: str, value: float) -> None:
    with recorder.batch() as record:
        record.of("a").signal = 1.0
        setattr(record.of("culprit"), field, value)


def fail(recorder: Recorder) -> None:
    with recorder.batch() as record:
        record.of("a").signal = 4.0
        raise Failed


def test_a_record_is_whole_or_not_at_all() -> None:
    recorder = recorded(3.0)
    with pytest.raises(Failed):
        fail(recorder)
    assert recorder.sites == recorded(3.0).sites
    assert recorder.batches == 1
    assert recorder.gram.draws == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("field", ["signal", "noise", "from_activation", "from_weight"])
def test_what_is_not_finite_is_refused(field: str, bad: float) -> None:
    recorder = recorded(3.0)
    with pytest.raises(QuantError, match="batch 1: the sensitivity of culprit is not finite"):
        spoil(recorder, field, bad)
    assert recorder.sites == recorded(3.0).sites
    assert recorder.batches == 1
