"""The example, in short: 3 bits for weights cost accuracy, and training gives it back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("grad")

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.long("seven seconds of training for each")
@pytest.mark.parametrize("method", ["lsq", "fixed"])
def test_training_through_few_bits(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("tabulate")
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    from qat_digits import run

    result = run(weight=3, epochs=6, qat_epochs=4, method=method)
    assert result.equal
    assert result.float32 > 0.85
    # 500 held-out digits: one standard deviation of a difference is about 1.5 points.
    assert result.float32 - result.calibrated > 0.05
    assert result.trained > result.calibrated + 0.03
