"""``torch-quant report``: one page that shows a quantized model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from torch_quant_cli.artifact import Artifact
from torch_quant_cli.exits import Failed
from torch_quant_cli.options import data_options, inputs_for, model_options, reading_of
from torch_quant_cli.running import Result, bar, command, wrapped

__all__ = ["cli"]


@click.command("report", short_help="One HTML page: layers, ranges, errors, size, speed.")
@click.argument("folder")
@data_options(8)
@model_options
@click.option("--out", help="The .html to write, or .json for its data.  [default: FOLDER.html]")
@click.option("--overwrite", is_flag=True, help="Replace a file at --out.")
@click.option("--title", default="", help="The headline.")
@click.option("--sensitivity", is_flag=True, help="Measure what each layer does to the outputs.")
@click.option(
    "--bench",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Measure how fast it is here, beside float, for about so long.",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME=FLOAT,QUANTIZED",
    help="A metric of yours, as accuracy=0.912,0.908; may be repeated.",
)
@command
def cli(
    folder: str, data: str | None, model: str | None, factory: str | None, out: str | None,
    overwrite: bool, title: str, sensitivity: bool, bench: float | None,
    metrics: tuple[str, ...], **options: Any,
) -> Result:  # fmt: skip
    """Write a page that shows FOLDER's model: what is quantized and why the rest is not, ranges and
    their grids, where the error comes in, size, and what it was made with.

    The page is one file that needs no network. The error is followed on --data, or on the batch
    that FOLDER keeps.

    \b
    Examples:
      torch-quant report my-bert-int8
      torch-quant report my-bert-int8 --data texts.txt --sensitivity --out bert.html \\
          --metric accuracy=0.912,0.908
    """
    how = reading_of(options)
    given = dict(_metric(each) for each in metrics)
    artifact = Artifact(folder, model, factory)
    target = _target(out, Path(folder), overwrite)
    quantizer, floating = artifact.quantizer(), artifact.float_model()
    inputs = inputs_for(artifact, floating, data, how)
    backend = artifact.about["backend"]
    ranking, profile = None, None
    if sensitivity:
        from torch_quant.graph.examples import call_example

        amp_model = quantizer.amp(floating, example_inputs=inputs[0])
        for each in bar(inputs, "measuring sensitivity", "batch"):
            call_example(amp_model, each)
        ranking = quantizer.sensitivity(amp_model)
    if bench is not None:
        profile = quantizer.profile(floating, inputs[0], backends=[backend], seconds=bench)
    report = quantizer.report(
        None,
        floating,
        inputs,
        sensitivity=ranking,
        profile=profile,
        metrics=given,
        title=title or Path(folder).resolve().name,
        backend=backend,
    )
    report.data["command"] = _made_by(artifact)
    report.save(target)
    size = target.stat().st_size
    text = f"{wrapped(str(report), '  ')}\n\nwrote {target} ({size / 1e3:.0f} kB)"
    return Result(text, {"out": str(target), "bytes_written": size, **report.data})


def _target(out: str | None, folder: Path, overwrite: bool) -> Path:
    """The file to write; raises :class:`Failed` if there is one, before any work."""
    from torch_quant.report.whole import checked_report

    place = out if out is not None else f"{folder.resolve().name}.html"
    target = Path(checked_report(place))
    if target.exists() and not overwrite:
        raise Failed(f"{target} exists: give another --out, or --overwrite to replace it")
    return target


def _metric(text: str) -> tuple[str, tuple[float, float]]:
    """A metric with its two values.

    >>> _metric("accuracy=0.912,0.908")
    ('accuracy', (0.912, 0.908))
    """
    name, _, values = text.rpartition("=")
    try:
        before, after = map(float, values.split(","))
    except ValueError:
        name = ""
    if not name:
        raise Failed(f"--metric {text}: expected NAME=FLOAT,QUANTIZED, as accuracy=0.912,0.908")
    return name, (before, after)


def _made_by(artifact: Artifact) -> str:
    """The command that made the folder, as far as it says."""
    about, words = artifact.about, ["torch-quant", "quantize"]
    words.append(artifact.source.path or str(artifact.source.factory))
    if artifact.source.path and artifact.source.factory:
        words += ["--factory", str(artifact.source.factory)]
    if about.get("data"):
        words += ["--data", about["data"], "--samples", str(about["samples"])]
    words += ["--config", "settings.json", "--backend", about["backend"]]
    for name in [*about.get("fallen_back", {}), *about.get("slower", [])]:
        words += ["--float", name]
    return shlex.join([*words, "--out", artifact.folder.name])
