"""``torch-quant compare``: how far two models are apart, and where the error comes in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from torch_quant_cli.artifact import Artifact, is_artifact
from torch_quant_cli.data import batches
from torch_quant_cli.distances import Distance, distance
from torch_quant_cli.exits import FAILED, SHORT, Failed
from torch_quant_cli.models import float_model, source_of
from torch_quant_cli.options import data_options, folder_of, inputs_for, reading_of
from torch_quant_cli.running import Result, bar, command, finite

if TYPE_CHECKING:
    from torch import nn

__all__ = ["cli"]


@click.command(
    "compare",
    short_help="Outputs of two models, then layer by layer.",
)
@click.argument("a")
@click.argument("b")
@data_options(8)
@click.option("--factory", help="With weights: the function that makes the model.")
@click.option(
    "--min-sqnr",
    type=float,
    metavar="DB",
    help="End with 4 if the outputs of B are further from those of A.",
)
@click.option("--outputs-only", is_flag=True, help="Do not follow the layers.")
@command
def cli(
    a: str, b: str, data: str | None, factory: str | None, min_sqnr: float | None,
    outputs_only: bool, **options: Any,
) -> Result:  # fmt: skip
    """Compare the outputs of A and B on data, then layer by layer: where does the error come in?

    A and B are float models, as for quantize, or folders of torch-quant quantize. Layers are
    followed for each of them that is quantized, against the float model that it was made of. Inputs
    are --data, or the batch that a folder keeps.

    \b
    Examples:
      torch-quant compare my-bert my-bert-int8 --data texts.txt
      torch-quant compare my-bert-int8 my-bert-mixed
      torch-quant compare my-bert my-bert-int8 --min-sqnr 20 --outputs-only
    """
    how = reading_of(options)
    artifacts = {each: Artifact(each) for each in (a, b) if is_artifact(each)}
    models = {each: _model(each, artifacts.get(each), factory) for each in (a, b)}
    first = next(iter(artifacts.values()), None)
    if data is None and first is None:
        raise Failed("neither model keeps a batch of data: give --data")
    if first is not None:
        inputs = inputs_for(first, models[a], data, how)
    else:
        inputs = batches(str(data), models[a], folder_of(a), how)
    apart = _outputs(models[a], models[b], inputs, (a, b))
    lines = [
        f"{b} against {a}, {len(inputs)} {'batch' if len(inputs) == 1 else 'batches'}: "
        + apart.shown
    ]
    from torch_quant.graph.examples import is_padded
    from torch_quant.report.tables import PADDED

    padded = any(map(is_padded, inputs))
    if padded and (outputs_only or not artifacts):  # else the tables of layers say so
        lines.append(PADDED)
    found: dict[str, Any] = {}
    for name, artifact in artifacts.items() if not outputs_only else ():
        floating = models[a] if a not in artifacts and name == b else artifact.float_model()
        backend = artifact.about["backend"]
        report = artifact.quantizer().compare(floating, inputs, backend=backend)
        lines += ["", f"{name}, layer by layer against float:", "", str(report)]
        found[name] = {
            "outputs_db": finite(report.outputs),
            "simulated_db": finite(report.simulated),
            "layers": [
                {"site": x.site, "op": x.op, "format": x.format, "before_db": finite(x.before),
                 "after_db": finite(x.after), "share": x.share}
                for x in report
            ],
        }  # fmt: skip
    short = not apart.reaches(min_sqnr)
    if short:
        lines += ["", f"short of --min-sqnr {min_sqnr:g}"]
    data_ = {
        "a": a,
        "b": b,
        "batches": len(inputs),
        "outputs": apart.to_dict(),
        "layers": found,
        "padded": padded,
    }
    return Result("\n".join(lines), data_, SHORT if short else 0)


def _model(given: str, artifact: Artifact | None, factory: str | None) -> nn.Module:
    if artifact is not None:
        return artifact.quant_model()
    return float_model(source_of(given, factory))


def _outputs(a: nn.Module, b: nn.Module, inputs: list[Any], names: tuple[str, str]) -> Distance:
    from torch_quant.core.metrics import float_leaves
    from torch_quant.graph.examples import call_example

    pairs = []
    for each in bar(inputs, "comparing outputs", "batch"):
        first, second = (float_leaves(call_example(model, each)) for model in (a, b))
        if [x.shape for x in first] != [x.shape for x in second]:
            raise Failed(
                f"{names[0]} gives outputs of shapes {[list(x.shape) for x in first]}, and "
                f"{names[1]} of {[list(x.shape) for x in second]}: they are different models",
                FAILED,
            )
        pairs.append((first, second))
    return distance(pairs)
