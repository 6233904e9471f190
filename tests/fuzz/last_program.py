"""Files with the program that is being tried and with those that failed, to try them again."""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from dataclasses import fields
from pathlib import Path

from programs import Program

__all__ = ["keep", "remember", "same_each_time"]

_ROOT = Path(__file__).parents[2]
_FOLDER = _ROOT / "out" / "fuzz"
_PATHS = [str(each) for each in (_ROOT, _ROOT / "tests", _ROOT / "tests" / "fuzz")]

_SCRIPT = '''\
"""A program, and the promise that was checked of it. To try it again:

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
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    return _write(program, promise, f"last{worker and '-'}{worker}.py", folder or _FOLDER)


def keep(program: Program, promise: str, error: BaseException, folder: Path | None = None) -> Path:
    """Write such a script of a program that failed; one for each program and promise.

    Args:
        program: which failed.
        promise: that was not kept.
        error: how; written below the script.
        folder: where to write; by default ``out/fuzz/failed``.

    Returns:
        The file.
    """
    name = hashlib.sha256(f"{promise} {program.source}".encode()).hexdigest()[:12]
    path = _write(program, promise, f"{name}.py", folder or _FOLDER / "failed")
    lines = "".join(traceback.format_exception(error)).splitlines()
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"# {line}".rstrip() + "\n" for line in ("", *lines))
    return path


def same_each_time(error: Exception) -> Exception:
    """``error`` as if it was raised where generated code is called, and by no other error.

    Generated code has another name each time. hypothesis tells failures apart by the place where
    they were raised, and would take one for several.
    """
    error.__cause__ = error.__context__ = None
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        if at.tb_next.tb_frame.f_code.co_filename.startswith("<"):
            at.tb_next = None
        at = at.tb_next
    return error


def _write(program: Program, promise: str, name: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
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
