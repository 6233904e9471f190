"""Sequences of calls that nobody thought of; see machine.py for what is done and what must hold."""

from __future__ import annotations

import pytest
from captures import shared_captures
from hypothesis import seed, settings
from hypothesis.stateful import run_state_machine_as_test
from machine import Sequences
from small_models import SMALL_MODELS, SmallModel


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    ("number", "small"), list(enumerate(SMALL_MODELS)), ids=[small.name for small in SMALL_MODELS]
)
def test_any_order_of_calls(number: int, small: SmallModel) -> None:
    machine = type("Sequences", (Sequences,), {"small": small, "model": small.build()})
    if settings().derandomize:  # another sequence for each model
        seed(number)(machine)
    with shared_captures():
        run_state_machine_as_test(machine, settings=settings())
