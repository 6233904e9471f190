"""The figures of a report as matplotlib draws them, for notebooks and papers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch_quant.errors import BackendUnavailable, InvalidConfig
from torch_quant.io.files import checked_target, write_atomically
from torch_quant.report.names import decibels, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "checked_ending",
    "coverage",
    "drawn",
    "error",
    "facts",
    "layer",
    "ranges",
    "sensitivity",
]

Layer = Mapping[str, Any]
_NAME = 44
_BARS = 30
_PARTS = 6


def facts(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """The headline of a report: what, in float, quantized."""
    before, after = data["bytes"]["float"], data["bytes"]["quantized"]
    rows = [
        ("work quantized", "", f"{data['coverage']:.1%}"),
        (
            "tensors",
            f"{before / 1e6:.1f} MB",
            f"{after / 1e6:.1f} MB ({after / (before or 1):.1%})",
        ),
    ]
    found = data["comparison"]
    if found:
        rows.append(("SQNR of the outputs", "", decibels(float(found["outputs"]))))
    for run in (data["speed"] or {}).get("runs", ()):
        if run["median"] is not None:
            time = f"{run['median']:.3g} ms"
            rows.append((run["name"], *(("", time) if run["quantized"] else (time, ""))))
    rows += [
        (x["name"], f"{float(x['float']):.5g}", f"{float(x['quantized']):.5g}")
        for x in data["metrics"]
    ]
    return [dict(zip(("", "float", "quantized"), row, strict=True)) for row in rows]


def drawn(
    path: str | os.PathLike[str] | None, draw: Callable[[Figure, Any], None], what: Any
) -> Figure:
    """A figure that ``draw`` fills with ``what``, saved if there is a path."""
    if path is not None:
        checked_target(path, "figure.png")
    try:
        from matplotlib.figure import Figure
    except ImportError as found:
        raise BackendUnavailable("plotting needs it: pip install matplotlib") from found
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    suffix = "" if path is None else checked_ending(path, figure)
    draw(figure, what)
    if path is not None:
        write_atomically(path, lambda name: figure.savefig(name, format=suffix, dpi=120))
    return figure


def checked_ending(path: str | os.PathLike[str], figure: Figure) -> str:
    """The format that the name of a file asks for, PNG if it has no ending.

    Raises:
        InvalidConfig: matplotlib does not write it.
    """
    suffix = os.path.splitext(os.fspath(path))[1].removeprefix(".").lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if suffix not in known:
        raise InvalidConfig(
            f"cannot write a figure to {os.fspath(path)}: matplotlib does not write .{suffix}; "
            f"expected a name that ends in {', '.join(f'.{each}' for each in sorted(known))}"
        )
    return suffix


def layer(figure: Figure, found: Layer) -> None:
    """Activations on their grids, and how often each code of the weight is used."""
    count = len(found["inputs"]) + (found["weight"] is not None)
    if not count:
        why = found["reason"] or "its scales are chosen at each call"
        raise InvalidConfig(f"{found['name']} has no grid to draw: {why}")
    figure.set_size_inches(10, 3.2 * count)
    all_axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    for axes, each in zip(all_axes, found["inputs"], strict=False):
        _activation(axes, each)
    if found["weight"] is not None:
        codes = found["weight"]["codes"]
        step = (codes["high"] - codes["low"]) / max(len(codes["counts"]) - 1, 1)
        places = [codes["low"] + i * step for i in range(len(codes["counts"]))]
        all_axes[-1].bar(places, codes["counts"], width=step, color="tab:green")
        all_axes[-1].set_title(f"codes of the weight ({found['weight']['format']})", fontsize=9)
    figure.suptitle(f"{found['name']} ({found['format']})", fontsize=10)


def _activation(axes: Axes, found: Mapping[str, Any]) -> None:
    grid, counts = found["grid"], found["histogram"]
    axes.axvspan(grid["low"], grid["high"], alpha=0.12, color="tab:blue", label="the grid")
    if grid["scale"] is not None and grid["levels"] <= 64:
        values = grid["values"]
        for i in range(grid["levels"]):
            place = grid["low"] + i * grid["scale"] if values is None else values[i] * grid["scale"]
            axes.axvline(place, color="tab:blue", linewidth=0.5)
    if counts is not None:
        places = [counts["low"] + (i + 0.5) * counts["width"] for i in range(len(counts["counts"]))]
        axes.bar(places, counts["counts"], width=counts["width"], color="tab:blue")
        axes.set_yscale("log")
    elif found["seen"] is not None:
        low, high = found["seen"]
        axes.plot([low, high], [0, 0], "|-", color="tab:blue", label="values seen")
        axes.set_yticks([])
    step = "" if grid["scale"] is None else f", step {grid['scale']:.3g}"
    axes.set_title(f"{found['tensor']}{found['behind']} ({grid['element']}{step})", fontsize=9)
    axes.legend(loc="upper right", fontsize=8)


def ranges(figure: Figure, layers: Sequence[Layer]) -> None:
    """The ends of each grid, and what calibration saw where that is more."""
    found = [(each["name"], x) for each in layers for x in each["inputs"]]
    if not found:
        raise InvalidConfig(
            "no layer has a range: activations are in float, or scaled at each call"
        )
    axes = figure.subplots()
    for place, (_, each) in enumerate(found):
        if each["seen"] is not None and not each["behind"]:
            axes.plot([place] * 2, each["seen"], color="tab:gray", linewidth=1)
        axes.plot([place] * 2, [each["grid"]["low"], each["grid"]["high"]], color="tab:blue")
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_xlabel("activations, in the order they are computed")
    axes.set_title("ranges that the grids cover (blue), and values seen (gray)")
    axes.grid(axis="y", alpha=0.3)


def coverage(figure: Figure, layers: Sequence[Layer]) -> None:
    """The work of each part of the model, the largest split until there are some to compare."""
    shown = sorted(_parts(layers).items(), key=lambda part: -sum(_work(part[1])))[:_BARS]
    figure.set_size_inches(10, max(2.5, 1.2 + 0.3 * len(shown)))
    axes, places = figure.subplots(), range(len(shown))
    quantized, rest = zip(*(_work(each) for _, each in shown), strict=True)
    axes.barh(places, quantized, color="tab:blue", label="quantized")
    axes.barh(places, rest, left=quantized, color="tab:orange", label="float")
    _named(axes, [name for name, _ in shown])
    axes.set_xlabel("share of the multiply-accumulates, %")
    axes.legend(loc="lower right")


def _work(layers: Sequence[Layer]) -> tuple[float, float]:
    """Percent of the model's work, quantized and in float."""
    sums = [0.0, 0.0]
    for each in layers:
        sums[0 if each["quantized"] else 1] += 100 * each["share"]
    return sums[0], sums[1]


def _parts(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Module -> its layers; whatever has most work is split while there are few modules."""
    found: dict[str, list[Layer]] = {"": list(layers)}
    whole: set[str] = set()
    while len(found) < _PARTS and (rest := found.keys() - whole):
        name = max(rest, key=lambda each: (sum(_work(found[each])), each))
        depth, parts = name.count(".") + 1 if name else 0, dict[str, list[Layer]]()
        for each in found[name]:
            part = ".".join(each["name"].split(".")[: depth + 1])
            parts.setdefault(part, []).append(each)
        if len(parts) + len(found) > _BARS:
            whole.add(name)
            continue
        del found[name]
        found |= parts
        whole |= {name} & parts.keys()
    return found


def error(figure: Figure, layers: Sequence[Layer]) -> None:
    """SQNR along the model above, what each layer adds below."""
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    after = [(i, float(x["error"]["after"])) for i, x in enumerate(layers)]
    known = [(i, sqnr) for i, sqnr in after if math.isfinite(sqnr)]
    above.plot(*zip(*known, strict=True) if known else ([], []), ".-", color="tab:blue")
    above.set_ylabel("SQNR of the result, dB")
    above.grid(alpha=0.3)
    adds = [100 * each["error"]["adds"] for each in layers]
    below.bar(range(len(layers)), adds, color="tab:red")
    below.set_ylabel("adds, %")
    below.margins(y=0.25)
    below.set_xlabel("layers, in the order they run")
    worst = sorted(range(len(layers)), key=lambda i: -adds[i])[:3]
    for i in (each for each in worst if adds[each] > 0):
        name = shortened(layers[i]["name"], 30)
        below.annotate(name, (i, adds[i]), fontsize=7, ha="center", va="bottom")


def sensitivity(figure: Figure, layers: Sequence[Layer]) -> None:
    """Bars of the most sensitive, split by weight and activations."""
    worst = sorted(layers, key=lambda each: -each["sensitivity"]["share"])[:_BARS]
    figure.set_size_inches(10, max(2.5, 1.2 + 0.26 * len(worst)))
    axes, places = figure.subplots(), range(len(worst))
    whole = [100 * each["sensitivity"]["share"] for each in worst]
    weight = [x * each["sensitivity"]["by_weight"] for x, each in zip(whole, worst, strict=True)]
    rest = [x - y for x, y in zip(whole, weight, strict=True)]
    axes.barh(places, rest, color="tab:blue", label="quantized activations")
    axes.barh(places, weight, left=rest, color="tab:orange", label="quantized weight")
    _named(axes, [each["name"] for each in worst])
    axes.set_xlabel("share of the noise, %")
    axes.legend(loc="lower right")


def _named(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [shortened(name, _NAME) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
