"""``torch-quant completion``: the line that teaches a shell to complete commands and options."""

from __future__ import annotations

import click

from torch_quant_cli.running import Result, command

__all__ = ["cli"]

_FILES = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/config.fish"}


@click.command("completion", short_help="The script by which a shell completes words.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@command
def cli(shell: str) -> Result:
    """Print the script that completes commands, options and files in SHELL.

    \b
    Examples:
      torch-quant completion bash >> ~/.bashrc
      torch-quant completion zsh >> ~/.zshrc
    """
    from click.shell_completion import get_completion_class

    from torch_quant_cli.main import cli as group

    found = get_completion_class(shell)
    assert found is not None
    script = found(group, {}, "torch-quant", "_TORCH_QUANT_COMPLETE").source()
    return Result(script, {"shell": shell, "file": _FILES[shell], "script": script})
