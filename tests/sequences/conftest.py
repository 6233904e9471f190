"""How long the sequences are: some for every run of the suite, many with ``LONG_TESTS``.

    LONG_TESTS=1 SEQUENCES=200 python -m pytest tests/sequences

tries 200 sequences of each model, other ones each time, and makes what fails as short as it can.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings
from thinning import LONG

settings.register_profile(
    "every run",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=3,
    stateful_step_count=14,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "long",
    database=None,
    deadline=None,
    max_examples=int(os.environ.get("SEQUENCES") or 20),
    stateful_step_count=30,
    phases=[Phase.generate, Phase.shrink],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("long" if LONG else "every run")
