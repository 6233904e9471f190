"""What all commands share: options, quiet libraries, and results as text or JSON."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import click

__all__ = ["Result", "bar", "command", "finite", "needed", "plain", "wrapped"]

T = TypeVar("T")
_PRINTED = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
_LOCAL = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Models are read from this disk; nothing is fetched behind the user's back."""
_WIDTH = 80


@dataclass
class Result:
    """What a command has to say.

    Args:
        text: for people, on stdout.
        data: the same for programs, with ``--json``.
        code: the exit code.
    """

    text: str
    data: Mapping[str, Any] = field(default_factory=dict)
    code: int = 0


def command(function: Callable[..., Result]) -> Callable[..., None]:
    """A command of click that prints what ``function`` returns, with the options that all share."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, and nothing else.")
    @click.option("--threads", type=click.IntRange(min=1), help="Threads to compute with.")
    @click.option("-v", "--verbose", is_flag=True, help="Show what the package logs on the way.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @click.pass_context
    def run(
        context: click.Context,
        /,
        as_json: bool,
        threads: int | None,
        verbose: bool,
        debug: bool,
        **options: Any,
    ) -> None:
        context.find_root().meta.update({"json": as_json, "debug": debug})
        with _surroundings(verbose, threads):
            result = function(**options)
        click.echo(json.dumps(plain(result.data), indent=1) if as_json else result.text)
        if result.code:
            context.exit(result.code)

    return functools.update_wrapper(run, function)


@contextlib.contextmanager
def _surroundings(verbose: bool, threads: int | None) -> Iterator[None]:
    """Libraries say nothing on stdout, which is for the result; warnings of ours go to stderr."""
    for name, value in (_PRINTED | _LOCAL).items():
        os.environ.setdefault(name, value)
    with contextlib.redirect_stdout(sys.stderr), _logging(verbose), warnings.catch_warnings():
        warnings.simplefilter("default" if verbose else "ignore")
        if threads is None:
            yield
            return
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class _Lines(logging.Handler):
    """Warnings as lines of a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        click.echo(wrapped(text, "  "), err=True)


@contextlib.contextmanager
def _logging(verbose: bool) -> Iterator[None]:
    logger, handler = logging.getLogger("torch_quant"), _Lines()
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def wrapped(text: str, indent: str = "") -> str:
    """A text in lines that a terminal of 80 columns holds; lines that begin with a blank stay.

    >>> wrapped("one two", "  ")
    'one two'
    """
    return "\n".join(
        textwrap.fill(
            line,
            _WIDTH - 2,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        if len(line) > _WIDTH - 2 and not line.startswith(" ")
        else line
        for line in text.splitlines()
    )


def bar(items: Iterable[T], what: str, unit: str) -> Iterator[T]:
    """``items``, with a progress bar on a terminal."""
    from tqdm import tqdm

    from torch_quant.graph.progress import hidden

    yield from tqdm(items, desc=what, unit=unit, disable=hidden())


def needed(*packages: str, what: str) -> None:
    """Raise :class:`Failed` unless all of these can be imported.

    >>> needed("click", what="this command")
    """
    import importlib.util

    from torch_quant_cli.exits import MISSING, Failed

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        install = {"PIL": "pillow", "yaml": "pyyaml"}
        names = " ".join(install.get(name, name) for name in missing)
        raise Failed(f"{what} needs {' and '.join(missing)}: pip install {names}", MISSING)


def finite(value: float | None) -> float | None:
    """A number that JSON has, else None.

    >>> finite(float("inf")), finite(2.0)
    (None, 2.0)
    """
    return value if value is not None and math.isfinite(value) else None


def plain(value: Any) -> Any:
    """A value as JSON has it.

    >>> plain({"a": (1, float("nan"))})
    {'a': [1, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return finite(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
