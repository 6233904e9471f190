"""Type checkers know the registered backends and what they return."""

from __future__ import annotations

from pathlib import Path

from mypy import api

ROOT = Path(__file__).parents[1]

PROGRAM = """
from torch_quant import Backend, Quantizer
from torch_quant.backends import Verification

reveal_type(Backend.ONEDNN)
reveal_type(Backend.get("toy"))
Quantizer(backend="toy")
reveal_type(Backend.ONNX.verify("model.onnx"))
found: Verification = Backend.IPEX.verify(__import__("torch").nn.Linear(2, 2))
other: Verification = Backend.ONNX.verify("model.onnx")
Backend.ONEDN
Backend.ONNX.verify(3)
"""


def test_type_checkers_know_the_backends(tmp_path: Path) -> None:
    """With the options of `make check`, whose cache it reads."""
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    out, err, _ = api.run(["--config-file", str(ROOT / "setup.cfg"), str(file)])
    assert not err
    lines = [line.partition("program.py:")[2] for line in out.splitlines()]
    errors = [line for line in lines if ": error:" in line]
    assert [line.partition(":")[0] for line in errors] == ["11", "12"], out
    assert 'has no attribute "ONEDN"' in errors[0]
    notes = [line for line in lines if ": note: Revealed type" in line]
    assert ["OneDNNBackend" in notes[0], "Backend" in notes[1], "OnnxReport" in notes[2]] == (
        [True] * 3
    ), out
