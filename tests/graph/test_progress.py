"""A slow capture shows a line on stderr, a quick one nothing."""

from __future__ import annotations

import io

import pytest
from capturing import capture
from models import Compute, normal

from torch_quant.graph import progress


def test_a_slow_capture_says_what_is_under_way(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY", 1e-9)
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    monkeypatch.setattr(progress, "hidden", lambda: False)  # as on a terminal
    capture(Compute(lambda x: x.softmax(-1).reshape(x.shape[0], -1)), normal(2, 6, 8))
    out, err = capfd.readouterr()
    assert not out
    assert "capturing the model: every size free, 20 s of processor time at most [00:0" in err
    assert "comparing it with the module" in err


def test_a_quick_capture_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY", 1e9)
    capture(Compute(lambda x: x * 2), normal(2, 6))
    assert capfd.readouterr() == ("", "")


class Writer:
    """A stderr as services have it."""

    def write(self, text: str) -> None:
        pass


@pytest.mark.parametrize("stream", [None, Writer()], ids=["none", "no terminal"])
def test_a_process_without_a_terminal(stream: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    assert progress.hidden()
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    assert progress.hidden()
