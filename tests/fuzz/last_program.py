"""A file with the program that is being tried, so that whoever crashes is known afterwards."""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from pathlib import Path

from programs import Program

__all__ = ["remember"]

_ROOT = Path(__file__).parents[2]
_PATHS = [str(each) for each in (_ROOT, _ROOT / "tests", _ROOT / "tests" / "fuzz")]

_SCRIPT = '''\
"""The program that was tried last, and the promise that was checked of it. To try it again:

    {python} {file}
"""
import faulthandler
import os
import sys

faulthandler.enable()
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = {paths}

import torch
from programs import Program
from promises import PROMISES

torch.set_num_threads(1)
torch.set_grad_enabled(False)
program = Program(
{arguments}
)
print(program.source, flush=True)
PROMISES[{promise!r}](program)
print("kept: {promise}")
'''


def remember(program: Program, promise: str, folder: Path | None = None) -> Path:
    """Write a script that checks ``promise`` of ``program``, before that is done here.

    Args:
        program: which may end the process.
        promise: its name in ``PROMISES``.
        folder: where to write; by default ``out/fuzz``.

    Returns:
        The file, ``last.py``, or one for each worker that tests at the same time.
    """
    folder = folder or _ROOT / "out" / "fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    path = folder / f"last{worker and '-'}{worker}.py"
    arguments = "\n".join(
        f"    {each.name}={getattr(program, each.name)!r}," for each in fields(program)
    )
    path.write_text(
        _SCRIPT.format(
            python=sys.executable, file=path, paths=_PATHS, arguments=arguments, promise=promise
        ),
        encoding="utf-8",
    )
    return path
