"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from torch_quant_cli.data import Reading, batches
from torch_quant_cli.exits import Failed

if TYPE_CHECKING:
    from torch import nn

    from torch_quant_cli.artifact import Artifact

__all__ = ["data_options", "inputs_for", "model_options", "reading_of"]

F = TypeVar("F", bound=Callable[..., Any])
_KEYS = ("samples", "batch_size", "tokenizer", "length", "text_field", "image_size")


def data_options(samples: int) -> Callable[[F], F]:
    """``--data`` and how it is read; ``samples`` is how many are taken."""
    options = (
        click.option(
            "--data",
            help="A .npz, a .safetensors, a .jsonl or text file, a folder of images, or "
            "module:iterator.",
        ),
        click.option("--samples", default=samples, show_default=True, type=click.IntRange(min=1),
                     help="How many samples to take at most."),
        click.option("--batch-size", type=click.IntRange(min=1),
                     help="Samples in a call.  [default: 8; 1 for text]"),
        click.option("--length", type=click.IntRange(min=1),
                     help="Tokens of a text at most.  [default: 128; 512 for decoders]"),
        click.option("--tokenizer", help="A folder with a tokenizer, where MODEL has none."),
        click.option("--text-field", default="text", show_default=True,
                     help="Where the objects of a .jsonl have their text."),
        click.option("--image-size", type=click.IntRange(min=1),
                     help="Pixels.  [default: what the model's folder says]"),
    )  # fmt: skip

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def model_options(function: F) -> F:
    """Where the float model of a quantized one is now."""
    for option in (
        click.option("--factory", help="With weights as --model: package.module:function."),
        click.option("--model", help="The float model, if it is no longer where it was."),
    ):
        function = option(function)
    return function


def reading_of(options: dict[str, Any]) -> Reading:
    """How data is read, taken out of the options of a command."""
    return Reading(**{key: options.pop(key) for key in _KEYS})


def inputs_for(artifact: Artifact, model: nn.Module, data: str | None, how: Reading) -> list[Any]:
    """Batches of ``data``, or the one that the folder kept."""
    if data is not None:
        return batches(data, model, artifact.hugging_face, how)
    example = artifact.example()
    if example is None:
        raise Failed(f"{artifact.folder} keeps no batch of the data: give --data")
    return [example]


def folder_of(model: str | None) -> Path | None:
    """A Hugging Face folder, or None."""
    path = Path(model) if model else None
    return path if path is not None and (path / "config.json").is_file() else None
