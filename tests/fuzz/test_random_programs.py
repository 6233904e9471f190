"""Models that nobody thought of, and what must hold of each; see the modules beside this one.

    LONG_TESTS=1 FUZZ=500 python -m pytest tests/fuzz

tries 500 models for each test, other ones each time, and makes what fails as short as it can: it is
printed as a program that can be pasted, and kept in ``out/fuzz/failed``. Where the process itself
ends, ``python out/fuzz/last.py`` tries its last program again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from flows import BACKENDS, QUICK
from hypothesis import HealthCheck, Phase, given, note, settings
from last_program import keep, remember, same_each_time
from onnx_files import needs
from programs import Program
from promises import PROMISES
from steps_of_programs import programs
from thinning import LONG, rarely

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
COMPILING = [rarely(name) for name in QUICK if name not in BACKENDS or name == "ipex"]
"""Half a second or more for each model: for the long run."""
FORMATS = ["int8_dynamic", *map(rarely, ("bfloat16", "int8_weight_only"))]


def fuzzed(few: int, share: float = 1.0) -> Callable[[Any], Any]:
    """Run a test on ``few`` programs, or on many in the long run, a share of what is asked for."""
    many = max(1, round(share * int(os.environ.get("FUZZ") or 50)))

    def decorate(test: Any) -> Any:
        chosen = settings(
            derandomize=not LONG,
            database=None,
            deadline=None,
            max_examples=many if LONG else few,
            phases=[Phase.generate, Phase.shrink] if LONG else [Phase.generate],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        return pytest.mark.timeout(0)(chosen(given(program=programs())(test)))

    return decorate


def check(program: Program, promise: str) -> None:
    """Check what is promised.

    A crash leaves the program in ``out/fuzz/last.py``, a failure in ``out/fuzz/failed``.
    """
    note(program.source)
    if LONG:
        remember(program, promise)
    try:
        PROMISES[promise](program)
    except Exception as error:
        if LONG:
            note(str(keep(program, promise, error)))
        raise same_each_time(error) from None


@fuzzed(6)
def test_any_model_keeps_the_promises(program: Program) -> None:
    check(program, "everything")


@fuzzed(3)
def test_sixteen_bits_are_float(program: Program) -> None:
    check(program, "sixteen bits")


@fuzzed(2, share=0.5)
def test_sizes_that_were_not_calibrated(program: Program) -> None:
    check(program, "strange sizes")


@pytest.mark.parametrize("promise", ["fallback", rarely("bfloat16 fallback")])
@fuzzed(2, share=0.3)
def test_what_fell_back(promise: str, program: Program) -> None:
    check(program, promise)


@pytest.mark.parametrize("recipe", FORMATS)
@fuzzed(2, share=0.3)
def test_formats_without_ranges(recipe: str, program: Program) -> None:
    check(program, recipe)


@pytest.mark.parametrize("backend", COMPILING)
@fuzzed(1, share=0.2)
def test_backends_that_compile(backend: str, program: Program) -> None:
    check(program, backend)


@pytest.mark.long("some seconds of the exporter to ONNX")
@needs("onnx", "onnxscript", "onnxruntime")
@fuzzed(1, share=0.2)
def test_onnx_files(program: Program) -> None:
    check(program, "an ONNX file")
