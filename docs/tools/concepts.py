"""The pictures of ``docs/concepts.md``; what they show of numbers is computed by the package.

python docs/tools/concepts.py
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch, Rectangle

from torch_quant import QuantSpec
from torch_quant.algorithms import RoundToNearest
from torch_quant.core.granularity import Granularity, PerChannel, PerGroup, PerTensor
from torch_quant.core.qparams import choose_qparams

FOLDER = Path(__file__).parents[1] / "concepts"
FLOAT, INT, PLAIN, WARM = "#4c78a8", "#54a24b", "#e8e8e8", "#f58518"


def scale_and_zero_point(axes: Any) -> None:
    """A line of floats, the 16 values that 4 bits have on it, and one float that is rounded."""
    torch.manual_seed(0)
    x = torch.randn(400) * 0.8 + 1.0
    spec = QuantSpec.of(bits=4, signed=False, symmetric=False)
    qparams = choose_qparams(x.min(), x.max(), spec)
    scale, zero = float(qparams.scale), int(qparams.zero_point)
    codes = torch.arange(int(spec.quant_min), int(spec.quant_max) + 1)
    points = ((codes - zero) * scale).tolist()
    axes.hist(x.numpy(), bins=40, color=FLOAT, alpha=0.5)
    top = axes.get_ylim()[1]
    for code, point in zip(codes.tolist(), points, strict=True):
        is_zero = code == zero
        axes.axvline(point, color=WARM if is_zero else INT, lw=2.5 if is_zero else 1)
        axes.text(point, top * 1.03, str(code), ha="center", color=WARM if is_zero else INT)
    axes.text(points[0] - 0.6 * scale, top * 1.03, "code:", ha="right", color=INT)
    value = points[10] + 0.37 * scale
    axes.plot([value], [0.55 * top], "o", color="black", zorder=3)
    axes.annotate(
        "", (points[10], 0.55 * top), (value, 0.55 * top), arrowprops={"arrowstyle": "->", "lw": 2}
    )
    axes.text(
        points[11] + 0.15 * scale, 0.55 * top,
        f"{value:.2f} becomes code 10,\nwhich stands for {points[10]:.2f}", va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85},
    )  # fmt: skip
    axes.annotate(
        "", (points[1], 0.85 * top), (points[2], 0.85 * top), arrowprops={"arrowstyle": "<->"}
    )
    axes.text(points[0], 0.91 * top, f"scale = {scale:.3f}",
              bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85})  # fmt: skip
    axes.set_xlabel(f"float value; 0.0 is code {zero}, the zero point")
    axes.set_ylabel("how many values of the tensor")
    axes.spines[["top", "right"]].set_visible(False)


def granularity(figure: Any) -> None:
    """One weight rounded to 4 bits three times; one row is much larger than the others."""
    torch.manual_seed(0)
    weight = torch.randn(6, 16) * torch.tensor([1.0, 0.3, 0.2, 4.0, 0.5, 0.15])[:, None]
    weight[1, :8] *= 6
    ways: dict[str, tuple[Granularity, tuple[int, int]]] = {
        "per tensor: 1 scale": (PerTensor(), (6, 16)),
        "per channel: 6 scales, one a row": (PerChannel(0), (1, 16)),
        "per group of 8: 12 scales": (PerGroup(8).on(0), (1, 8)),
    }
    for i, (name, (kind, (rows, columns))) in enumerate(ways.items()):
        spec = QuantSpec.of(bits=4, signed=True, symmetric=True, granularity=kind)
        codes, qparams = RoundToNearest().quantize(weight, spec, {})
        grid = qparams.scale.reshape(6 // rows, 16 // columns)
        scales = grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        error = (codes * scales - weight).abs() / weight.abs().mean(1, keepdim=True)
        axes = figure.add_subplot(1, 3, i + 1)
        image = axes.imshow(error, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for row in range(0, 6, rows):
            for column in range(0, 16, columns):
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), columns, rows, fill=False,
                                         edgecolor=WARM, lw=2))  # fmt: skip
        axes.set_title(f"{name}\nmean error {float(error.mean()):.0%}", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks(range(6), [f"row {n}" for n in range(6)] if not i else [""] * 6)
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.9)
    bar.set_label("error, in mean sizes of its row")


def _box(axes: Any, x: float, y: float, text: str, color: str, width: float = 1.7) -> None:
    axes.add_patch(FancyBboxPatch((x - width / 2, y - 0.28), width, 0.56, color=color,
                                  boxstyle="round,pad=0.04", alpha=0.9))  # fmt: skip
    dark = color not in (PLAIN, "white")
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "lw": 1.5, "color": "#555555"})
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.1)
    axes.text(*middle, text, ha="center", va="bottom", fontsize=8, color="#333333")


def calibration(axes: Any) -> None:
    """Who gives what to whom, from the float model to the int8 one."""
    _box(axes, 1, 2, "your float model", FLOAT)
    _box(axes, 4, 2, "calib proxy", PLAIN)
    _box(axes, 7.2, 2, "ranges,\nin the quantizer", WARM)
    _box(axes, 10.4, 2, "quantized model", INT)
    _box(axes, 4, 3.2, "your data", PLAIN)
    _box(axes, 4, 0.8, "the float outputs,\nbit for bit", PLAIN, 2.0)
    _box(axes, 7.2, 0.8, "AMP proxy: what does\neach layer cost?", PLAIN, 2.3)
    _arrow(axes, (1.95, 2), (3.05, 2), ".calib(model)")
    _arrow(axes, (4, 2.85), (4, 2.4))
    _arrow(axes, (4, 1.6), (4, 1.2))
    _arrow(axes, (4.95, 2), (6.25, 2), "smallest and\nlargest value")
    _arrow(axes, (8.15, 2), (9.45, 2), ".quantize(model)")
    _arrow(axes, (7.2, 1.6), (7.2, 1.2), "")
    axes.text(7.35, 1.4, ".amp(model)", fontsize=8, va="center")
    _arrow(axes, (8.45, 0.95), (10.0, 1.6))
    axes.text(9.35, 1.05, ".fallback(amp_model, num=3)", fontsize=8, va="center")
    axes.set_xlim(0, 11.6)
    axes.set_ylim(0.4, 3.6)


def pairs(axes: Any) -> None:
    """Pairs around a layer, as simulated and as a kernel runs them."""
    axes.text(0.1, 2.6, "the graph with pairs:\nfloat arithmetic", va="center", fontsize=9)
    axes.text(0.1, 0.7, "on a backend:\none int8 kernel", va="center", fontsize=9)
    names = ("x", "quantize", "dequantize", "linear", "quantize", "dequantize")
    colors = (FLOAT, WARM, WARM, FLOAT, WARM, WARM)
    places = (2.7, 4.15, 6.1, 7.8, 9.5, 11.45)
    for x, name, color in zip(places, names, colors, strict=True):
        _box(axes, x, 2.6, name, color, 0.7 if name == "x" else 1.25)
    for i, (a, b) in enumerate(pairwise(places)):
        kind = "int8" if i in (1, 4) else "float"
        _arrow(axes, (a + (0.42 if not i else 0.7), 2.6), (b - 0.7, 2.6), kind)
    _box(axes, 7.8, 3.75, "dequantize", WARM, 1.25)
    _box(axes, 4.4, 3.75, "int8 weight", INT, 1.25)
    _arrow(axes, (5.08, 3.75), (7.1, 3.75), "int8")
    _arrow(axes, (7.8, 3.4), (7.8, 2.95))
    _box(axes, 2.7, 0.7, "x", FLOAT, 0.7)
    _box(axes, 4.15, 0.7, "quantize", WARM, 1.25)
    _box(axes, 7.8, 0.7, "int8 linear: integers are multiplied,\nthe scales come last", INT, 3.9)
    _box(axes, 11.45, 0.7, "dequantize", WARM, 1.25)
    _arrow(axes, (3.12, 0.7), (3.45, 0.7))
    _arrow(axes, (4.85, 0.7), (5.75, 0.7), "int8")
    _arrow(axes, (9.85, 0.7), (10.75, 0.7), "int8")
    axes.add_patch(Rectangle((5.4, 2.15), 4.8, 2.1, fill=False, ls="--", edgecolor=INT, lw=1.5))
    axes.text(10.1, 4.0, "what one kernel\ntakes the place of", color=INT, fontsize=8, ha="right",
              va="center")  # fmt: skip
    axes.set_xlim(0, 12.2)
    axes.set_ylim(0.2, 4.4)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    scale_and_zero_point(axes)
    figure.savefig(FOLDER / "scale_and_zero_point.png", dpi=110)
    figure = pyplot.figure(figsize=(10, 3.2), layout="constrained")
    granularity(figure)
    figure.savefig(FOLDER / "granularity.png", dpi=110)
    for draw in (calibration, pairs):
        figure, axes = pyplot.subplots(figsize=(10, 3.4), layout="constrained")
        draw(axes)
        axes.axis("off")
        figure.savefig(FOLDER / f"{draw.__name__}.png", dpi=110)


if __name__ == "__main__":
    main()
