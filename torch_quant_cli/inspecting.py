"""``torch-quant inspect``: what a folder or file holds: formats, ranges, what is float, and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torch_quant_cli.artifact import Artifact, is_artifact
from torch_quant_cli.exits import Failed
from torch_quant_cli.running import Result, command, needed, wrapped

if TYPE_CHECKING:
    from torch_quant import QuantPlan

__all__ = ["cli"]

_ROWS = 40


@click.command("inspect", short_help="Formats, ranges, what is in float and why.")
@click.argument("path")
@click.option("--all", "every", is_flag=True, help=f"List every layer, not the first {_ROWS}.")
@click.option("--float", "only_float", is_flag=True, help="List only what is in float, and why.")
@command
def cli(path: str, every: bool, only_float: bool) -> Result:
    """Show what PATH holds: the format of each layer, its range, what is in float and why.

    PATH is a folder of torch-quant quantize, of torch_quant.save or quantizer.save, a checkpoint of
    quantized weights, or an ONNX file.

    \b
    Examples:
      torch-quant inspect my-bert-int8
      torch-quant inspect my-bert-int8 --float
      torch-quant inspect my-bert-int8 --json
    """
    data = _read(path)
    return Result(_text(data, every, only_float), data)


def _read(path: str) -> dict[str, Any]:
    place = Path(path)
    if place.is_file():
        if place.suffix == ".onnx":
            return _of_onnx(place)
        raise Failed(
            f"{path}: files that are read are .onnx; else give a folder of torch-quant quantize, "
            "of torch_quant.save, or a checkpoint"
        )
    if not place.is_dir():
        raise Failed(f"there is no file or folder {path}")
    if (place / "model.json").is_file():
        return _of_model(place)
    if (place / "quantizer.json").is_file():
        return _of_quantizer(place)
    if (place / "config.json").is_file():
        return _of_checkpoint(place)
    raise Failed(f"{path} holds nothing that torch-quant wrote: it has no model.json")


def _of_model(folder: Path) -> dict[str, Any]:
    from torch_quant import Quantizer, QuantPlan
    from torch_quant.io.folder import read_folder

    data, tensors = read_folder(folder, "model")
    runs = data["modules"][""]["runs"]
    plan = QuantPlan.from_dict(runs["plan"])
    ranges: dict[str, list[float]] = {}
    if (folder / "quantizer.json").is_file():
        ranges = _ranges(plan, Quantizer.load(folder))
    about = Artifact(str(folder)).about if is_artifact(str(folder)) else {}
    return {
        "kind": "quantized model",
        "path": str(folder),
        "class": data["modules"][""]["class"],
        "backend": runs["backend"],
        "calibration": runs["calibration"],
        "run": {
            key: about[key]
            for key in ("model", "recipe", "data", "samples", "settings", "bytes", "outputs",
                        "fallen_back", "slower")
            if key in about
        },
        "bytes": sum(x.numel() * x.element_size() for x in tensors.values()),
        **_planned(plan, ranges),
    }  # fmt: skip


def _ranges(plan: QuantPlan, quantizer: Any) -> dict[str, list[float]]:
    """Tensor -> the ends that its grid covers."""
    found: dict[str, list[float]] = {}
    for site in plan.values():
        for key in site.inputs:
            recorded = quantizer.state.find(key)
            if recorded is not None and site.needs_ranges and key not in found:
                low, high = recorded.range(site.activation)
                found[key] = [float(low.min()), float(high.max())]
    return found


def _planned(plan: QuantPlan, ranges: Mapping[str, list[float]]) -> dict[str, Any]:
    total = plan.macs or 1
    sites = [
        {
            "name": site.name,
            "op": site.op,
            "quantized": site.quantized,
            "format": site.format if site.quantized else site.precision,
            "reason": site.reason,
            "share": site.macs / total,
            "range": next((ranges[key] for key in site.inputs if key in ranges), None),
            "transforms": [str(each) for each in site.transforms],
            "method": None if site.method is None else str(site.method),
        }
        for site in plan.values()
    ]
    others: list[dict[str, Any]] = [
        {"name": op.name, "op": op.op, "quantized": False, "format": "float32",
         "reason": op.reason, "share": op.macs / total, "range": None, "transforms": [],
         "method": None}
        for op in plan.float_ops
    ]  # fmt: skip
    return {"summary": plan.summary, "coverage": plan.coverage, "sites": [*sites, *others]}


def _of_quantizer(folder: Path) -> dict[str, Any]:
    from torch_quant import Quantizer

    quantizer = Quantizer.load(folder)
    statistics = quantizer.state.describe()
    return {
        "kind": "calibration",
        "path": str(folder),
        "backend": quantizer.backend.name,
        "calibration": statistics,
        "run": {"settings": quantizer.to_config(), "fallen_back": quantizer.fallen_back},
        "sites": [],
        "summary": f"ranges of {statistics.get('batches', 0)} batches; a model is not in it",
    }


def _of_checkpoint(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise Failed(f"{folder / 'config.json'} is no JSON: {error}") from error
    about = config.get("quantization_config")
    if about is None:
        raise Failed(
            f"{folder} is a float model: torch-quant quantize {folder} --data ... --out DIR"
        )
    from torch_quant.checkpoints.stored import opened

    checkpoint = opened(folder)
    sites: list[dict[str, Any]] = [
        {"name": name, "op": "linear", "quantized": True, "format": str(weight.spec.element),
         "reason": "", "share": None, "range": None, "transforms": [], "method": None}
        for name, weight in checkpoint.stored.items()
    ]  # fmt: skip
    return {
        "kind": "checkpoint",
        "path": str(folder),
        "class": (config.get("architectures") or ["?"])[0],
        "summary": f"{about.get('quant_method')}: {len(sites)} quantized layers",
        "run": {},
        "sites": sites,
    }


def _of_onnx(file: Path) -> dict[str, Any]:
    needed("onnx", "onnxruntime", what=f"reading {file}")
    import onnx

    from torch_quant import Backend, QuantPlan

    model = onnx.load(str(file), load_external_data=False)
    held = {each.key: each.value for each in model.metadata_props}
    planned: dict[str, Any] = {"sites": [], "summary": "a file of somebody else: it has no plan"}
    left_out: Mapping[str, str] = {}
    if "torch_quant.plan" in held:
        planned = _planned(QuantPlan.from_dict(json.loads(held["torch_quant.plan"])), {})
        left_out = Backend.get("onnx").verify(file).left_out
    return {
        "kind": "ONNX file",
        "path": str(file),
        "run": {},
        "calibration": json.loads(held.get("torch_quant.calibration", "{}")),
        "left_out_by_onnxruntime": dict(left_out),
        **planned,
    }


def _text(data: dict[str, Any], every: bool, only_float: bool) -> str:
    run, lines = data["run"], []
    what = f" of {data['class'].rpartition('.')[2]}" if data.get("class") else ""
    where = f" on {data['backend']}" if data.get("backend") else ""
    lines.append(f"{data['path']}: {data['kind']}{what}{where}")
    lines.append(wrapped(data["summary"], "  "))
    if run.get("model"):
        made = run["model"]["path"] or run["model"]["factory"]
        recipe = run.get("recipe") or "the default recipe"
        origin = f"from {made} by {recipe}"
        if run.get("data"):
            origin += f", calibrated on {run['samples']} samples of {run['data']}"
        lines.append(wrapped(origin, "  "))
    outputs = run.get("outputs")
    if outputs and outputs["sqnr_db"] is not None:
        lines.append(f"outputs against float when it was made: SQNR {outputs['sqnr_db']:.1f} dB")
    sites = [each for each in data["sites"] if not (only_float and each["quantized"])]
    if sites:
        lines += ["", _table(sites if every else sites[:_ROWS])]
        if not every and len(sites) > _ROWS:
            lines.append(f"... and {len(sites) - _ROWS} more: --all")
    elif only_float:
        lines += ["", "nothing is in float"]
    reasons = _reasons(data["sites"])
    if reasons:
        lines += ["", "In float", *reasons]
    if data.get("left_out_by_onnxruntime"):
        lines += ["", "Planned in int8, and run in float by onnxruntime"]
        lines += [
            wrapped(f"{name}: {why}", "  ") for name, why in data["left_out_by_onnxruntime"].items()
        ]
    return "\n".join(lines)


def _table(sites: Iterable[Mapping[str, Any]]) -> str:
    from torch_quant.report.tables import name_table

    rows = [
        {
            "layer": each["name"],
            "op": _op(each["op"]),
            "format": each["format"].replace(" weights", " w"),
            "work": "" if each["share"] is None else f"{each['share']:.1%}",
            "input range": ""
            if each["range"] is None
            else f"{each['range'][0]:.3g} .. {each['range'][1]:.3g}",
        }
        for each in sites
    ]
    if not any(row["input range"] for row in rows):
        for row in rows:
            del row["input range"]
    return name_table(rows)


def _op(name: str) -> str:
    """An op type in a word.

    >>> _op("scaled_dot_product_attention"), _op("embedding_bag")
    ('attention', 'embedding_bag')
    """
    from torch_quant.report.names import shortened

    if len(name) <= 14:
        return name
    return "attention" if "attention" in name else shortened(name, 14)


def _reasons(sites: Iterable[Mapping[str, Any]]) -> list[str]:
    """Each reason once, with what it is the reason of."""
    found: dict[str, list[str]] = {}
    for each in sites:
        if not each["quantized"]:
            found.setdefault(each["reason"] or "it is no product", []).append(each["name"])
    lines = []
    for why, names in found.items():
        rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(wrapped(f"{', '.join(names[:4])}{rest}: {why}", "  "))
    return [f"  {line}" for each in lines for line in each.splitlines()]
