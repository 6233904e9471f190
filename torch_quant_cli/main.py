"""The group of commands, and how what they raise becomes a message and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import signal
from types import FrameType
from typing import Any, NoReturn

import click

from torch_quant_cli.exits import FAILED, INTERRUPTED, Failed, failure_of

__all__ = ["COMMANDS", "cli", "main"]

COMMANDS = {
    "doctor": "doctor",
    "quantize": "quantizing",
    "quantize-files": "quantizing_files",
    "inspect": "inspecting",
    "compare": "comparing",
    "bench": "benching",
    "report": "reporting",
    "export": "exporting",
    "migrate": "migrating",
    "generate": "generating",
    "completion": "completing",
}
"""Command -> the module that has it, as ``cli``."""

_EXAMPLES = """\b
Examples:
  torch-quant doctor
  torch-quant quantize my-bert --data texts.txt --out my-bert-int8
  torch-quant inspect my-bert-int8
  torch-quant compare my-bert my-bert-int8
\b
Exit codes:
  0 done; 1 failed; 2 a mistake in what was given; 3 something is missing on
  this machine; 4 done, but short of what was asked; 130 interrupted
"""


class _Commands(click.Group):
    """Commands whose modules are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"torch_quant_cli.{COMMANDS[cmd_name]}")
        found: click.Command = module.cli
        return found

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.UsageError):
            raise
        except (KeyboardInterrupt, click.Abort):
            note = ctx.meta.get("interrupted", "nothing was written")
            raise _told(ctx, Failed(f"interrupted: {note}", INTERRUPTED)) from None
        except Exception as error:
            found = failure_of(error)
            if ctx.meta.get("debug"):
                raise
            if found is None:
                first = str(error).strip().splitlines()[:3]
                found = Failed(
                    f"{type(error).__name__}: {' '.join(first)}\n"
                    "This is unexpected; --debug shows where it comes from.",
                    FAILED,
                )
            raise _told(ctx, found) from error


def _told(ctx: click.Context, failure: Failed) -> Failed:
    failure.as_json = bool(ctx.meta.get("json"))
    return failure


@click.group(
    cls=_Commands,
    epilog=_EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="torch_quant", prog_name="torch-quant")
def cli() -> None:
    """Quantize PyTorch models, and run, compare, measure and export the result.

    Every command has --help with examples, --json for programs, and messages that name the fix.
    """


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """The console script."""
    with contextlib.suppress(ValueError, AttributeError):  # not in the main thread, not on Windows
        signal.signal(signal.SIGTERM, _terminated)  # what is half written is cleared away
    cli(prog_name="torch-quant")


if __name__ == "__main__":
    main()
