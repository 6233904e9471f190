"""The table of accuracies: its rows, its scores, and what happens to ways that fail."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from thinning import LONG

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("accuracy")


SCRIPT = """
import json, os, sys
ways = sys.argv[sys.argv.index("--ways") + 1 : sys.argv.index("--limit")]
for way in ways:
    if way == "NNCF":
        os._exit(3)
    print("noise of a tool")
    print("row " + json.dumps({"model": "n", "way": way}), flush=True)
"""


def test_a_process_that_dies_costs_one_way(
    accuracy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "dies.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(accuracy, "__file__", str(script))
    options = argparse.Namespace(limit=9, threads=1, backend=None)
    rows = list(accuracy.rows_of(options, "n", ["default", "NNCF", "INC"]))
    assert [row["way"] for row in rows] == ["default", "NNCF", "INC"]
    assert [row.get("error") for row in rows] == [None, "the process ended with 3", None]


def test_the_table_shows_scores_and_says_why_others_are_missing(accuracy: Any) -> None:
    known = {"model": "n", "network": "Net", "metric": "MRR"}
    rows = [
        {**known, "way": "float32", "score": {"MRR": 0.5, "cosine": 1.0}, "close": {}},
        {**known, "way": "NNCF", "score": {"MRR": 0.4, "cosine": 0.99}, "close": {"SQNR dB": 20.0}},
        {"model": "n", "way": "INC", "error": "KeyError: 'x'"},
    ]
    assert accuracy.table(rows, list(accuracy.WAYS)).splitlines() == [
        "| | float32 | NNCF | INC |",
        "|---|---|---|---|",
        "| Net: MRR | 0.5000 | 0.4000, 0.9900, 20.0 dB | fails |",
        "",
        "What could not be measured:",
        "",
        "- Net, INC: KeyError: 'x'",
    ]


def test_a_chart_is_drawn(accuracy: Any, tmp_path: Path) -> None:
    row = {"model": "n", "network": "Net", "metric": "MRR", "way": "NNCF", "score": {"MRR": 0.4}}
    accuracy.chart([{**row, "close": {"SQNR dB": 20.0}}], ["NNCF"], tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_scores_of_sounds(accuracy: Any) -> None:
    audio = importlib.import_module("accuracy_audio")
    scores, same = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([True, False, True, False])
    assert audio._equal_error(scores, same) == pytest.approx(0.5)
    assert audio._equal_error(scores, torch.tensor([True, True, False, False])) == 0.0
    task = audio.Pitch("tiny")
    bins = (task.unseen[1] - audio.FIRST_CENTS) / audio.CENTS
    salience = torch.exp(-0.5 * (torch.arange(360.0) - bins[:, None]).square())
    assert task.score([salience], [salience])["within 10 cents %"] > 99.0
    assert task.score([salience.roll(5, 1)], [salience])["within 50 cents %"] < 1.0


@pytest.mark.skipif(not LONG, reason="it trains for a minute: make test-long")
@pytest.mark.timeout(0)
def test_a_network_by_ways_of_ours(
    accuracy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "quiet", lambda: None)  # it would silence other tests
    ways = ["fast()", "default", "3 layers in float", "optimize"]
    given = {"models": ["digits-cnn"], "ways": ways, "threads": 1, "limit": 600, "backend": None}
    with torch.enable_grad():
        accuracy.one(argparse.Namespace(**given))
    lines = [line[4:] for line in capsys.readouterr().out.splitlines() if line[:4] == "row "]
    rows = [json.loads(line) for line in lines]
    assert [row["way"] for row in rows if "error" not in row] == ways, rows
    assert all(row["score"]["accuracy %"] > 95.0 for row in rows)
    near = {row["way"]: row["close"]["SQNR dB"] for row in rows}
    assert near["3 layers in float"] > near["default"] > 30.0
