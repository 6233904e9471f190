"""``torch-quant quantize-files``: from the files of a float checkpoint to files of integers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torch_quant_cli.data import batches, check_data
from torch_quant_cli.exits import Failed
from torch_quant_cli.options import data_options, reading_of
from torch_quant_cli.resuming import checked_unfinished
from torch_quant_cli.running import Result, command, wrapped
from torch_quant_cli.settings import quantizer_of, settings_options, wants_rounding

if TYPE_CHECKING:
    from torch import nn

    from torch_quant import Quantizer

__all__ = ["cli"]

_RECIPE = "int4_weight_only"


@click.command(
    "quantize-files",
    short_help="Quantize a language model that need not fit into memory.",
)
@click.argument("folder")
@settings_options
@data_options(128)
@click.option(
    "--to",
    "form",
    default="compressed-tensors",
    show_default=True,
    type=click.Choice(["compressed-tensors", "gptq"]),
    help="The format.",
)
@click.option(
    "--dtype",
    default="bfloat16",
    show_default=True,
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of what stays in float, and of the scales.",
)
@click.option(
    "--shard-mb",
    default=1024,
    show_default=True,
    type=click.IntRange(min=1),
    help="Megabytes of each file that is written, which are held in memory.",
)
@click.option("--out", required=True, help="The folder to write.")
@command
def cli(**given: Any) -> Result:
    """Quantize the checkpoint in FOLDER, a weight or a block at a time.

    FOLDER is a float model of transformers: config.json and safetensors. The result is a Hugging
    Face folder that vLLM, transformers and torch_quant.load_checkpoint read. The recipe is
    int4_weight_only unless --recipe or --config says otherwise; without --data, weights are
    rounded to nearest. Embeddings and the layer that gives the words stay in float, as what serves
    such files expects; a --config says itself which layers are quantized.

    A run with --data that is interrupted goes on where it was when the same command is given again.

    \b
    Examples:
      torch-quant quantize-files my-llm --recipe int8_weight_only --out my-llm-8bit
      torch-quant quantize-files my-llm --recipe int4_weight_only -o group_size=32 \\
          -o method=gptq --data texts.txt --to gptq --out my-llm-gptq
    """
    how, source = reading_of(given), Path(given["folder"])
    if not (source / "config.json").is_file():
        raise Failed(f"{source} has no config.json: expected a folder of transformers")
    if given["data"] is not None:
        check_data(given["data"])
    if given["recipe"] is None and given["config"] is None:
        given["recipe"] = _RECIPE
    out = _new_folder(given["out"])
    model = _skeleton(source)
    if given["config"] is None:
        given["in_float"] = [*_embeddings(model), *given["in_float"]]
    quantizer = quantizer_of(given, backend="reference", capture="modules")
    if not wants_rounding(quantizer):
        if given["data"] is not None:
            raise Failed(
                f"--data {given['data']} would not be read: weights are rounded to nearest. Give "
                "--recipe int4_weight_only -o method=gptq to round with data, or leave --data out"
            )
        return _written(source, out, quantizer, given, None, None)
    if given["data"] is None:
        raise Failed(
            "the weight method rounds with data: give --data, some hundred samples, or leave "
            "-o method=... out, which rounds to nearest"
        )
    unfinished = checked_unfinished(out)
    found = batches(given["data"], model, source, how)
    return _written(source, out, quantizer, given, found, unfinished)


def _new_folder(out: str) -> Path:
    from torch_quant.io.files import checked_target_folder

    return checked_target_folder(out)


def _written(
    source: Path, out: Path, quantizer: Quantizer, given: dict[str, Any],
    found: list[Any] | None, kept: Path | None,
) -> Result:  # fmt: skip
    import torch

    from torch_quant import quantize_checkpoint

    if kept is not None:
        click.get_current_context().find_root().meta["interrupted"] = (
            f"finished blocks are in {kept}, and the same command goes on from there"
        )
    quantize_checkpoint(
        quantizer,
        source,
        out,
        given["form"],
        batches=found,
        folder=kept,
        dtype=getattr(torch, given["dtype"]),
        shard_bytes=given["shard_mb"] << 20,
    )
    if kept is not None:
        shutil.rmtree(kept, ignore_errors=True)
    left = ", ".join(given["in_float"])
    in_float = f"in float: {left}" if left else "as --config says"
    before, after = map(_bytes, (source, out))
    told = [
        wrapped(f"{source} as {quantizer.qconfig.weight} in {given['form']}; {in_float}", "  "),
        f"tensors: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB now "
        f"({after / max(before, 1):.1%})",
        f"wrote {out}",
        "",
        f"  vllm serve {out}",
        f"  torch-quant generate {out} --prompt '...'",
    ]
    data = {
        "out": str(out), "model": str(source), "recipe": given["recipe"], "format": given["form"],
        "settings": quantizer.to_config(), "bytes": {"before": before, "after": after},
    }  # fmt: skip
    return Result("\n".join(told), data)


def _skeleton(source: Path) -> nn.Module:
    """The model without weights."""
    from torch_quant.checkpoints.files import CheckpointFiles
    from torch_quant.checkpoints.skeletons import built

    return built(CheckpointFiles(source), hollow=True)


def _embeddings(model: Any) -> list[str]:
    """The paths of the layers that take and give words."""
    asked = ("get_input_embeddings", "get_output_embeddings")
    ends = [getattr(model, name, lambda: None)() for name in asked]
    return [path for path, module in model.named_modules() if any(module is each for each in ends)]


def _bytes(folder: Path) -> int:
    return sum(each.stat().st_size for each in folder.glob("*.safetensors"))
