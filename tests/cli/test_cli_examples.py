"""Every example that ``--help`` and the documentation show runs as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from commands import make_home, run

from torch_quant_cli.main import COMMANDS, cli

PAGE = Path(__file__).parents[2] / "docs" / "command_line.md"


def _joined(text: str) -> str:
    return re.sub(r"\\\n\s*", "", text)


def _of_help() -> list[str]:
    found = []
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        text = _joined(command.help or "")
        found += [line.strip() for line in text.splitlines() if "torch-quant " in line]
    return [line for line in found if re.match(r"(echo .*\| )?torch-quant ", line)]


def _of_page() -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in _joined(block).splitlines()]
    return [line for line in lines if line.startswith("torch-quant ")]


def test_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_home(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    done: set[str] = set()
    for line in [*_of_help(), *_of_page()]:
        command = line.partition(" >> ")[0].partition("   #")[0].strip()
        if command in done:
            continue
        done.add(command)
        typed, _, piped = command.rpartition("| ")
        arguments = shlex.split(piped)[1:]
        if arguments[0] == "bench":
            arguments += ["--seconds", "0.01", "--backend", "onednn"]
        stdin = shlex.split(typed)[1] if typed else None
        run(*arguments, stdin=stdin)
    assert len(done) > 15
