"""``torch-quant bench``: how fast the model is here, in float and quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from torch_quant_cli.artifact import Artifact
from torch_quant_cli.options import data_options, inputs_for, model_options, reading_of
from torch_quant_cli.running import Result, command, finite, wrapped

if TYPE_CHECKING:
    from torch_quant.report.speed import Profile

__all__ = ["cli"]


def _table(found: Profile) -> str:
    """As the report has it, in 80 columns."""
    from tabulate import tabulate

    whole = found.runs[0].median or 0.0
    rows = [
        {
            "model": each.name.replace("quantized, Backend.", "").lower(),
            "median ms": "-" if each.median is None else f"{each.median:.3g}",
            "p90 ms": "-" if each.p90 is None else f"{each.p90:.3g}",
            "x float32": "-" if each.median is None else f"{whole / each.median:.2f}",
            "SQNR dB": "-" if each.sqnr is None else f"{each.sqnr:.1f}",
        }
        for each in found
    ]
    lines = [tabulate(rows, headers="keys", disable_numparse=True)]
    lines += [wrapped(f"{x.name} does not run: {x.why_not}", "  ") for x in found if x.why_not]
    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    lines.append(f"{threads}, {found.rounds} calls of each in turns")
    return "\n".join(lines)


@click.command(
    "bench",
    short_help="How fast it is here, in float and quantized.",
)
@click.argument("folder")
@data_options(8)
@model_options
@click.option(
    "--backend",
    "backends",
    multiple=True,
    help="Which to measure; may be repeated.  [default: all that run here]",
)
@click.option(
    "--seconds",
    default=5.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="About how long to measure.",
)
@click.option("--compiled", is_flag=True, help="Also the float model by torch.compile.")
@command
def cli(
    folder: str, data: str | None, model: str | None, factory: str | None,
    backends: tuple[str, ...], seconds: float, compiled: bool, **options: Any,
) -> Result:  # fmt: skip
    """Measure FOLDER's model on this machine: float32, bfloat16, and quantized, in turns.

    The inputs are the first batch of --data, or the batch that FOLDER keeps: give those that the
    model will serve. Sizes decide what is fastest.

    \b
    Examples:
      torch-quant bench my-bert-int8
      torch-quant bench my-bert-int8 --data texts.txt --batch-size 8 --threads 1
    """
    how = reading_of(options)
    artifact = Artifact(folder, model, factory)
    quantizer, floating = artifact.quantizer(), artifact.float_model()
    inputs = inputs_for(artifact, floating, data, how)[0]
    found = quantizer.profile(
        floating, inputs, backends=backends or None, seconds=seconds, compiled=compiled
    )
    from torch_quant.report.tables import PADDED
    from torch_quant_cli.data import shapes

    runs = [
        {
            "name": each.name,
            "backend": each.backend,
            "median_ms": each.median,
            "p90_ms": each.p90,
            "sqnr_db": finite(each.sqnr),
            "why_not": each.why_not,
        }
        for each in found
    ]
    text = f"{_table(found)}\n{wrapped(f'inputs: {shapes(inputs)}', '  ')}"
    if found.padded:
        text += f"\n{PADDED}"
    if found.fastest is not None:
        text += f"\nfastest: {found.fastest}, {found.gain:.2f} times the fastest float"
    return Result(
        text,
        {
            "runs": runs,
            "fastest": found.fastest,
            "gain": found.gain,
            "threads": found.threads,
            "rounds": found.rounds,
            "padded": found.padded,
            "inputs": shapes(inputs),
        },
    )
