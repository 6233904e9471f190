"""The command line starts without PyTorch, says what it does, and completes words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import data_of, run

from torch_quant import Backend, native
from torch_quant.backends import available_backends, known_backends
from torch_quant_cli.main import COMMANDS, cli

ROOT = Path(__file__).parents[2]

PROBE = """
import sys
from torch_quant_cli.main import COMMANDS, cli
for arguments in (["--help"], *([name, "--help"] for name in COMMANDS)):
    cli(arguments, standalone_mode=False)
print("LOADED", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_help_imports_neither_torch_nor_the_package() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    text, _, loaded = done.stdout.partition("LOADED")
    slow = {"torch", "torch_quant", "transformers", "numpy", "scipy", "tabulate", "tqdm"}
    assert not slow & set(loaded.split())
    for name in COMMANDS:
        assert f"torch-quant {name}" in text, "each help shows an example"
    assert max(map(len, text.splitlines())) <= 100


def test_a_shell_completes_commands_and_options() -> None:
    environment = os.environ | {
        "_TORCH_QUANT_COMPLETE": "bash_complete", "COMP_WORDS": "torch-quant qu", "COMP_CWORD": "1"
    }  # fmt: skip
    code = "from torch_quant_cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip().split() == ["plain,quantize", "plain,quantize-files"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(shell: str) -> None:
    assert "_TORCH_QUANT_COMPLETE" in run("completion", shell).stdout


def test_doctor_says_what_runs_and_how_to_get_the_rest() -> None:
    found = data_of("doctor")
    assert {*found["backends"]} == {each.name for each in known_backends()}
    running = {name for name, each in found["backends"].items() if each["runs"]}
    assert running == {each.name for each in available_backends()}
    for name, each in found["backends"].items():
        assert each["missing"] == Backend.get(name).unavailable()
    assert found["native_kernels"]["built"] == (native.unavailable() is None)
    text = run("doctor").stdout
    assert "looked for, nothing was computed" in text
    for name, each in found["backends"].items():
        assert f"{'ok' if each['runs'] else '--'}  {name}" in text
    assert max(map(len, text.splitlines()[2:])) <= 100  # the first names the interpreter


def test_an_unknown_command_is_a_mistake() -> None:
    assert "No such command 'quantise'" in run("quantise", expect=2).stderr


def test_help_lists_every_command_in_one_line() -> None:
    text = run("--help").stdout
    for name in COMMANDS:
        command = cli.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        assert f"  {name}" in text
        assert command.short_help in text.replace("\n", " ")
