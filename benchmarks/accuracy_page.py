"""The accuracy table and its chart, from the rows of ``results/accuracy.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["chart", "table"]

Row = dict[str, Any]
CLOSE = ("SQNR dB", "nats from float")


def table(rows: list[Row], ways: list[str]) -> str:
    """One line a network: its metric by each way, and how near the outputs are to float's.

    >>> score = {"metric": "MRR", "score": {"MRR": 0.64}, "network": "N", "model": "n"}
    >>> print(table([{**score, "way": "float32", "close": {}}], ["float32"]))
    | | float32 |
    |---|---|
    | N: MRR | 0.6400 |
    """
    found = {(row["model"], row["way"]): row for row in rows}
    ways = [way for way in ways if any(key[1] == way for key in found)]
    lines = [f"| | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    reasons = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of = [found.get((model, way)) for way in ways]
        name = next((f"{x['network']}: {x['metric']}" for x in of if x and "metric" in x), model)
        lines.append(f"| {name} | {' | '.join(map(_cell, of))} |")
        reasons += [f"- {name.partition(':')[0]}, {x['way']}: {x['error']}" for x in of
                    if x and "error" in x]  # fmt: skip
    return "\n".join(
        [*lines, *(["", "What could not be measured:", "", *reasons] if reasons else [])]
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "error" in row:
        return "fails"
    value = row["score"][row["metric"]]
    text = f"{value:.4f}" if row["metric"] == "MRR" else f"{value:.2f}"
    if "cosine" in row["score"] and row["close"]:
        text += f", {row['score']['cosine']:.4f}"
    near = [f"{row['close'][key]:.1f} dB" for key in ("SQNR dB",) if key in row["close"]]
    part = [f"{row['quantized']} products"] if "quantized" in row else []
    if row.get("int8 %", 100.0) < 99.95:
        part.append(f"{row['int8 %']:.0f} % of the work in int8")
    return ", ".join([text, *near, *part])


def chart(rows: list[Row], ways: list[str], file: Path) -> None:
    """Output SQNR of each network by each way, as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    near = [row for row in rows if "SQNR dB" in row.get("close", {})]
    names = list(dict.fromkeys(row["network"] for row in near))
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(names) + 1.5), layout="constrained")
    for i, way in enumerate(way for way in ways if any(row["way"] == way for row in near)):
        of = [row for row in near if row["way"] == way]
        axes.plot(
            [row["close"]["SQNR dB"] for row in of], [names.index(row["network"]) for row in of],
            "os^Dvx+*"[i % 8], label=way, alpha=0.8,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.set_xlabel("SQNR of the outputs, dB (higher is nearer to float)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
