"""What the programs in benchmarks/ refuse before they measure anything."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

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
