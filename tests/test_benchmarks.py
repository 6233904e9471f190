"""What the programs in benchmarks/ refuse before they measure anything."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from thinning import LONG
from torch import nn

from torch_quant import Quantizer

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def latency(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("latency")


@pytest.mark.parametrize("backend", ["onnx", "reference", "disc", "float32"])
def test_a_backend_without_kernels(
    latency: Any,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["latency.py", "--backend", backend])
    with pytest.raises(SystemExit):
        latency.parse()
    error = capsys.readouterr().err
    assert f"argument --backend: invalid choice: '{backend}'" in error
    assert "onednn" in error
    assert "ipex" in error


def test_each_backend_with_kernels(latency: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in latency.OURS:
        monkeypatch.setattr(sys, "argv", ["latency.py", "--backend", backend])
        assert latency.parse().ways == ["float32", backend]


def test_the_chart_shows_every_way(latency: Any) -> None:
    assert latency.MARKS.keys() == latency.WAYS.keys() - {latency.BASE}


def test_the_page_has_every_way_and_marks_the_fastest(latency: Any) -> None:
    page = importlib.import_module("latency_page")
    assert page.NAMES.keys() == latency.WAYS.keys()
    ways = {
        "onednn": {"ms": 5.0, "speed-up": 4.0, "SQNR dB": 20.0},
        "float32": {"ms": 20.0, "speed-up": 1.0, "SQNR dB": None},
        "nncf in openvino": {"ms": 10.0, "speed-up": 2.0, "SQNR dB": 8.6},
    }
    rows = [{"model": "m", "ways": ways}, {"model": "n", "ways": {"float32": ways["float32"]}}]
    assert page.speed_table(rows).splitlines() == [
        "| | m | n |",
        "|---|---|---|",
        "| eager float32 | 20 ms | 20 ms |",
        "| **ONEDNN** | **4.0x** | - |",
        "| NNCF in OpenVINO | 2.0x (9 dB) | - |",
    ]


def test_new_cells_take_the_place_of_old_ones(latency: Any) -> None:
    old = [{"model": "m", "ways": {"a": 1, "b": 2}, "not run": {"c": "why", "d": "why"}}]
    new = {"model": "m", "ways": {"b": 3, "c": 4}, "not run": {"e": "other"}}
    assert latency.with_cells(old, new) == [
        {"model": "m", "ways": {"a": 1, "b": 3, "c": 4}, "not run": {"d": "why", "e": "other"}}
    ]
    assert latency.with_cells(old, {**new, "model": "n"}) == [*old, {**new, "model": "n"}]


def test_rows_are_added_to_rows_of_the_same_conditions(
    latency: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    alike = {key: harness.conditions()[key] for key in latency.ALIKE}
    assert harness.rows_beside("some", alike) == []
    harness.keep("some", [{"model": "m"}])
    assert harness.rows_beside("some", alike) == [{"model": "m"}]
    monkeypatch.setattr(sys, "argv", ["latency.py", "--out", "some", "--add", "--threads", "64"])
    monkeypatch.setattr(latency, "quiet", lambda: None)  # of the whole process
    before, kept = torch.get_num_threads(), (tmp_path / "some.json").read_text()
    try:
        with pytest.raises(SystemExit, match=r"some\.json: .* with threads \d+, and now it is 64"):
            latency.main()
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "some.json").read_text() == kept


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for memory")
def test_memory_of_a_way(latency: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process has freed before counts for less than the 64 MiB of the weights."""
    memory = importlib.import_module("memory")

    def make() -> nn.Module:
        return nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(4))).eval()

    case = memory.Case(make, lambda: [{"input": torch.ones(n, 2048)} for n in (2, 3)])
    monkeypatch.setattr(memory, "MODELS", {"four layers": case})
    before = torch.get_num_threads()
    try:
        found = memory.measure("four layers", "float32")
    finally:
        torch.set_num_threads(before)
    assert found["model MB"] == pytest.approx(64, abs=0.1)
    assert 40 < found["serving MB"] <= found["peak MB"] + 1 < 120


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``benchmarks/zoo.py``; a module of the tests has that name too."""
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("zoo_of_benchmarks", FOLDER / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WHOLE = {
    "name": "a/good", "class": "Good", "captured": "whole", "calib equal": True, "coverage": 1.0,
    "reference": 40.0, "onednn": 40.0, "onnx": 130.0, "seconds": 3.0, "cpu seconds": 2.0,
}  # fmt: skip
ROWS = (
    WHOLE,
    WHOLE | {"name": "a/exact", "onnx": "inf"},
    WHOLE
    | {
        "name": "a/pieces",
        "captured": "3 pieces",
        "onnx": "3 files load",
        "float ms": 4.0,
        "onednn ms": 2.0,
    },
    WHOLE | {"name": "a/noisy", "reference": 6.0, "onnx": 9.0, "rounding": 7.0, "16 bits": 44.0},
    WHOLE | {"name": "b/noise", "reference": 2.5, "onnx": 9.0, "rounding": 4.0, "16 bits": 44.0},
    WHOLE | {"name": "b/worse", "reference": 6.0, "rounding": 8.5, "16 bits": 44.0},
    WHOLE | {"name": "b/wrong", "reference": 9.0, "rounding": 8.0, "16 bits": 9.0},
    WHOLE | {"name": "b/raises", "error": "KeyError: 'a|b'", "at": "onnx"},
    WHOLE | {"name": "b/other", "calib equal": False},
    WHOLE | {"name": "b/far", "onednn": 3.0},
    WHOLE | {"name": "b/none", "reference": "nan"},
    {"name": "c/cannot", "class": "Cannot", "not built": "no inputs", "seconds": 1.0},
)


def test_the_page_of_the_zoo_counts_what_works(zoo: Any) -> None:
    text = zoo.page(ROWS, {"architectures": 20})
    assert "**4 of 11 work (36.4%)**" in text
    assert "12 of 20 architectures were tried; 1 could not be built" in " ".join(text.split())
    for line in (
        r"| b/raises | onnx: KeyError: 'a\|b' |", "| b/other | calib: not the float bits |",
        "| b/far | onednn: 3.0 dB |", "| b/none | reference: nan dB |", "| c/cannot | no inputs |",
        "| a | 4 | 4 | 0 |", "| b | 0 | 7 | 0 |", "| c | 0 | 0 | 1 |",
        "| a/pieces | 3 pieces | yes | 100% | 40.0 | 40.0 | 3 files load | 2.00 | 2 |",
        "| b/noise | reference: 2.5 dB |", "| b/worse | reference: 6.0 dB |",
        "| b/wrong | 16 bits: 9.0 dB |", "| a/noisy | 6.0 | 40.0 | 9.0 | 7.0 | 44.0 |",
    ):  # fmt: skip
        assert line in text.splitlines()
    assert "Of those that work, 1 amplify noise" in text
    assert "amplif" not in zoo.page([WHOLE], {"architectures": 20})


def test_rounding_by_hooks_is_as_near_as_the_package(zoo: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(196, 5)
    ).eval()
    batches = [{"input": torch.randn(n, 3, 8, 8)} for n in (4, 6)]
    expected = zoo._outputs(model, batches)
    found = zoo._rounded(model, batches, expected)
    quantizer = Quantizer()
    zoo._outputs(quantizer.calib(model), batches)
    int8 = zoo._decibels(expected, zoo._outputs(quantizer.quantize(model), batches))
    assert abs(found["rounding"] - int8) < 2
    assert found["16 bits"] > found["rounding"] + 30
    assert all(map(zoo._equal, expected, zoo._outputs(model, batches)))  # the weights are back


class Product(nn.Module):
    """Channels times channels of an image of any size."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.flatten(2)
        return rows @ rows.mT


def test_products_are_rounded_by_hooks_too(zoo: Any) -> None:
    torch.manual_seed(0)
    model, batches = Product(), [{"input": torch.randn(n, 3, 8, n)} for n in (4, 6)]
    expected = zoo._outputs(model, batches)
    found = zoo._rounded(model, batches, expected)
    assert 30 < found["rounding"] < 60
    assert found["16 bits"] > found["rounding"] + 30


def test_the_zoo_goes_on_where_it_was_stopped(zoo: Any, tmp_path: Path) -> None:
    known = zoo.architectures()
    log, names = tmp_path / "zoo.jsonl", list(known)
    log.write_text(json.dumps(WHOLE | {"name": names[0]}) + '\n{"name": "' + names[1])
    left = zoo.todo(argparse.Namespace(log=log, resume=True, only=None))
    assert {name for name, _ in left} == set(names[1:])
    assert not zoo.rows_of(tmp_path / "none.jsonl")
    with pytest.raises(SystemExit, match="no architecture a/b: --list has them"):
        list(zoo.todo(argparse.Namespace(log=log, resume=False, only=["a/b"])))


def test_each_model_of_the_zoo_has_a_process_and_a_limit(
    zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(name: str, made_by: str, put: Any) -> None:
        put({"at": "calib"})
        if name == "raises":
            raise KeyError(made_by)
        while name == "spins":
            pass
        if name == "exits":
            os._exit(3)

    monkeypatch.setattr(zoo, "measure", measure)
    assert zoo._one("raises", "X", 20)["error"] == "KeyError: 'X'"
    assert zoo._one("exits", "X", 20)["error"] == "the process ended with 3"
    spent = zoo._one("spins", "X", 1)
    assert spent["error"] == "not done in 1 s of the processor"
    assert spent["at"] == "calib"
    assert "error" not in zoo._one("ends", "X", 20)


def test_small_models_are_built_by_the_names_of_their_sizes(zoo: Any) -> None:
    models = importlib.import_module("zoo_models")
    model, batches, _ = models.build("transformers/squeezebert", "SqueezeBertModel")
    assert sum(x.numel() for x in model.parameters()) < 200_000
    first, second = (x["input_ids"].shape for x in batches)
    assert first != second
    with torch.no_grad():
        outputs = models.tensors(model(**batches[0]))
    assert all(float(x.std()) > 0.01 for x in outputs)  # signals do not vanish
    with pytest.raises(models.NotBuilt):
        models.build("transformers/none", "NoSuchModel")


@pytest.mark.skipif(not LONG, reason="half a minute: make test-long")
@pytest.mark.timeout(0)
def test_a_model_of_the_zoo(zoo: Any) -> None:
    row: dict[str, Any] = {"name": "transformers/albert", "seconds": 0.0}
    zoo.measure(row["name"], "AlbertModel", row.update)
    assert zoo.works(row), row
    assert row["captured"] == "whole"
    assert row["coverage"] == 1.0
    assert row["onnx"] == "inf" or row["onnx"] > 60
