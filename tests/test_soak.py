"""Models that are quantized and dropped, and calls of many sizes, leave nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from thinning import rarely

ROOT = Path(__file__).parents[1]
SOURCES = 60
"""Kilobytes that PyTorch keeps of each model: the code that fx makes of its 16 graphs, as text, and
what memory is lost between. Without its other notes let go, 85 and more were kept of each."""
CHANCE = 3000
"""Kilobytes that a process has more or less by chance: free memory between what is not free."""


def soaked(backend: str, recipe: str, cycles: int, calls: int) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tests" / "soaking.py"), backend, recipe]
    ran = subprocess.run(
        [*command, str(cycles), str(calls)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("recipe", "cycles"), [("int8_static", 4), rarely("int8_weight_only", 16)])
def test_nothing_is_left_of_models_and_calls(recipe: str, cycles: int) -> None:
    found = soaked("onednn", recipe, cycles, 500)
    assert found["cycles_objects"] == {}
    assert found["calls_objects"] == {}
    assert found["calls_kb"] < CHANCE


@pytest.mark.long("ten minutes: a thousand models and ten thousand calls")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: run on Linux")
@pytest.mark.parametrize("backend", ["onednn", "reference"])
@pytest.mark.parametrize("recipe", ["int8_static", "int8_weight_only"])
def test_memory_does_not_grow(backend: str, recipe: str) -> None:
    found = soaked(backend, recipe, 1000, 10_000)
    assert found["cycles_objects"] == {}
    assert found["calls_objects"] == {}
    assert found["cycles_kb"] < 500 * SOURCES
    assert found["calls_kb"] < CHANCE
