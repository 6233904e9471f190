"""``torch-quant migrate``: settings of another tool as a file for ``quantize --config``."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

from torch_quant_cli.artifact import check_above
from torch_quant_cli.exits import Failed
from torch_quant_cli.running import Result, command, wrapped

__all__ = ["cli"]

_WIDTH, _COLUMN = 78, 11


@click.command("migrate", short_help="Turn another tool's settings into a file for --config.")
@click.argument("file", type=click.Path())
@click.option("--out", type=click.Path(), help="The YAML or JSON to write.  [default: none]")
@click.option("--kind", help="The tool's class, as RTNConfig, where the file does not tell.")
@click.option("--overwrite", is_flag=True, help="Replace the file at --out.")
@command
def cli(file: str, out: str | None, kind: str | None, overwrite: bool) -> Result:
    """Read FILE, a configuration of Intel Neural Compressor 3, and say what became of each entry.

    FILE is what config.to_json_file wrote, or the qconfig.json beside a saved model.

    \b
    Examples:
      torch-quant migrate rtn.json
      torch-quant migrate rtn.json --out migrated.yaml
      torch-quant quantize my-llm --config migrated.yaml --out my-llm-rtn
      torch-quant migrate short.json --kind GPTQConfig --out gptq.json
    """
    if not Path(file).is_file():
        raise Failed(f"{file}: there is no such file")
    if out is not None and Path(out).suffix not in (".json", ".yaml", ".yml"):
        raise Failed(f"--out {out}: expected a file that ends in .yaml, .yml or .json")
    if out is not None and Path(out).exists() and not overwrite:
        raise Failed(f"--out {out} exists: --overwrite replaces it")
    if out is not None:
        check_above(out)
    if Path(file).suffix == ".onnx":
        raise Failed(
            f"{file}: ranges are matched with the layers of a model, in Python: "
            "torch_quant.migrate.from_onnx(file, model, example_inputs)"
        )
    from torch_quant.migrate import from_inc

    found = from_inc(file, kind=kind)
    data = found.to_dict() | {"out": out}
    lines = [wrapped(found.headline, "  "), ""]
    for row in found:
        lines += _lines(row.outcome.value, row.entry)
        for text in (row.here and f"-> {row.here}", row.why):
            lines += _lines("", text) if text else []
    if out is not None:
        found.to_config(out)
        configs = (found.qconfig, *found.overrides.values())
        data_too = found.needs_blocks or any(each.needs_ranges for each in configs if each)
        next_step = f"torch-quant quantize MODEL --config {out} --out DIR"
        lines += ["", f"wrote {out}", "", f"  {next_step}{' --data DATA' * data_too}"]
    return Result("\n".join(lines), data)


def _lines(first: str, text: str) -> list[str]:
    """A text in a column of its own, with a word beside its first line."""
    found = textwrap.wrap(text, _WIDTH - _COLUMN, break_long_words=False, break_on_hyphens=False)
    return [f"{first if i == 0 else '':{_COLUMN}}{line}" for i, line in enumerate(found)]
