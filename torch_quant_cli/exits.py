"""How a command ends: the exit codes, and errors that carry one."""

from __future__ import annotations

import json
import sys
import textwrap
from typing import IO, Any

import click

__all__ = ["FAILED", "INTERRUPTED", "MISSING", "MISTAKE", "SHORT", "Failed", "failure_of"]

FAILED = 1
"""The model could not be captured, quantized, exported or written."""
MISTAKE = 2
"""An option, a path, a file or a setting is wrong; the message names the fix."""
MISSING = 3
"""A package, or what a backend needs, is not on this machine; the message says how to get it."""
SHORT = 4
"""It was done, and the result falls short of what was asked, as with ``--min-sqnr``."""
INTERRUPTED = 130
"""By Ctrl-C or SIGTERM. Nothing half written is left."""

_WIDTH = 78


class Failed(click.ClickException):
    """Ends a command with a message and an exit code.

    Args:
        message: what failed, where, and the fix.
        code: one of the above.
    """

    exit_code: int  # type: ignore[misc] # each has its own

    def __init__(self, message: str, code: int = MISTAKE) -> None:
        super().__init__(message)
        self.exit_code = code
        self.as_json = False

    def show(self, file: IO[Any] | None = None) -> None:
        """The message on stderr, and as JSON on stdout where JSON was asked for."""
        if self.as_json:
            data = {"error": self.message, "exit_code": self.exit_code}
            click.echo(json.dumps(data, indent=1))
        lines = f"error: {self.message}".splitlines()
        wrapped = [
            textwrap.fill(
                line, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
            if len(line) > _WIDTH and not line.startswith(" ")
            else line
            for line in lines
        ]
        click.echo("\n".join(wrapped), file=file, err=file is None)


def failure_of(error: BaseException) -> Failed | None:
    """The end of a command that raised ``error``; None if it is a mistake of this package's own."""
    if isinstance(error, Failed):
        return error
    errors = sys.modules.get("torch_quant.errors")  # not imported: nothing of it was raised
    if errors is not None and isinstance(error, errors.QuantError):
        code = FAILED
        if isinstance(error, errors.InvalidConfig):
            code = MISTAKE
        elif isinstance(error, errors.BackendUnavailable):
            code = MISSING
        return Failed(str(error), code)
    if isinstance(error, OSError) and not isinstance(error, ImportError):
        return Failed(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), FAILED)
    if isinstance(error, MemoryError):
        return Failed("the memory of this machine does not suffice: give fewer --samples", FAILED)
    return None
