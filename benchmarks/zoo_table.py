"""What the runs of ``zoo.py`` found, as a page of the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["LEAST", "page", "reason", "table", "works"]

LEAST = 15.0
"""dB. Random weights are rounded worse than trained ones; a wrong branch has nothing in common."""
MARGIN = 2.0
"""dB by which what is computed in 8 bits may be below the same roundings without the package."""
LEAST_OF_16_BITS = 30.0
"""dB. A wrong branch is as wrong in 16 bits."""
NOTHING = 3.0
"""dB below which nothing can be told: an output of noise alone is at 0."""

COLUMNS = (
    "architecture", "captured", "calib", "coverage", "reference", "onednn", "onnx", "speed",
    "seconds",
)  # fmt: skip

STEPS = ("reference", "onednn", "onnx")

Row = Mapping[str, Any]


def reason(row: Row) -> str:
    """Why a row does not count as working; empty where it does."""
    if "error" in row:
        return f"{row.get('at', '')}: {row['error']}".removeprefix(": ")
    if not row.get("calib equal"):
        return "calib: not the float bits"
    least = LEAST
    if all(isinstance(row.get(each), float) for each in ("rounding", "16 bits")):
        if row["16 bits"] < LEAST_OF_16_BITS:
            return f"16 bits: {_number(row['16 bits'])} dB"
        least = min(LEAST, max(NOTHING, row["rounding"] - MARGIN))
    for step in STEPS:
        value = row.get(step)
        if (isinstance(value, float) and value < least) or value == "nan" or value == "-inf":
            return f"{step}: {_number(value)} dB"
    return ""


def works(row: Row) -> bool:
    """Whether everything that was tried did."""
    return "not built" not in row and not reason(row)


def _by_rounding(row: Row) -> bool:
    """Whether it works since 8 bits are as far without the package."""
    found = [row.get(each) for each in STEPS]
    return works(row) and any(isinstance(x, float) and x < LEAST for x in found)


def _number(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value if value is not None else "")


def _cell(text: str, most: int = 300) -> str:
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return line if len(line) <= most else f"{line[: most - 3]}..."


def table(rows: Sequence[Row]) -> list[str]:
    """A line of a Markdown table for each row."""
    lines = []
    for row in rows:
        share = row.get("coverage")
        mark = "*" if row.get("compared") == "pieces" else "†" if _by_rounding(row) else ""
        cells = [
            row["name"],
            row.get("captured", ""),
            {True: "yes", False: "no", None: ""}[row.get("calib equal")],
            "" if share is None else f"{share:.0%}",
            *(f"{_number(row.get(each))}{mark}" for each in ("reference", "onednn")),
            _number(row.get("onnx")),
            f"{row['float ms'] / row['onednn ms']:.2f}" if row.get("onednn ms") else "",
            f"{row.get('cpu seconds', row['seconds']):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(rows: Sequence[Row], conditions: Mapping[str, Any]) -> str:
    """The page, from the rows of the log and the conditions of the run."""
    built = [row for row in rows if "not built" not in row]
    good = [row for row in built if works(row)]
    bad = [row for row in built if not works(row)]
    rest = [row for row in rows if "not built" in row]
    share = f"{len(good) / len(built):.1%}" if built else "none"
    facts = ", ".join(f"{key} {value}" for key, value in conditions.items())
    noisy = [
        (row["name"], *(_number(row[each]) for each in (*STEPS, "rounding", "16 bits")))
        for row in built
        if _by_rounding(row)
    ]
    doubled = (
        f"Of those that work, {len(noisy)} amplify noise: they are below {LEAST:.0f} dB, and at "
        f"most {MARGIN:.0f} dB below what 8 bits give without the package. "
        if noisy
        else ""
    )
    count = f"{len(rows)} of {conditions['architectures']}"
    paragraphs = [
        "# Every architecture",
        "Small models with random weights of the architectures that the environment can "
        "build, each without an edit: calibrated on two batches of different sizes, quantized "
        "to int8, run, and exported. `make bench-zoo` makes this page. No code of the "
        "package names an architecture.",
        f"**{len(good)} of {len(built)} work ({share})**: calibration gives the float bits, "
        f"int8 is {LEAST:.0f} dB or more from float on the reference and on oneDNN's kernels, "
        "and so is the ONNX file in onnxruntime from the quantized model. Weights are random, "
        f"so SQNR tells a bug from rounding, and not how accurate a trained model is. {doubled}"
        f"{count} architectures were tried; {len(rest)} could not be built small.",
        _table(["library", "work", "of", "not built"], _by_library(rows)),
        f"Made with: {facts}. Models of timm and torchvision: the smallest of each module, where "
        "that is large with two layers.",
        "## What does not work",
        _table(["architecture", "what happens"], [(row["name"], reason(row)) for row in bad])
        or "Nothing that was tried.",
        *(
            [
                "## What amplifies noise",
                "With random weights, a deep network may make much of little: with what each "
                "linear layer, convolution and product reads rounded to 8 bits by hooks of "
                "PyTorch, without the package, it is about as far from float. Such a row counts "
                f"where int8 is at most {MARGIN:.0f} dB below that, and {NOTHING:.0f} dB or more, "
                f"and 16 bits on the reference {LEAST_OF_16_BITS:.0f} dB or more.",
                _table(("architecture", *STEPS, "8 bits by hooks", "16 bits"), noisy),
            ]
            if noisy
            else []
        ),
        "## What was measured",
        "`calib`: bit-equal with float. `coverage`: share of the products in int8 on oneDNN. "
        "`reference` and `onednn`: dB from float; with `*`, outputs are choices (which boxes are "
        "kept), so the pieces are compared, each with its inputs in float; with `†`, see above. "
        "`onnx`: dB of the file in onnxruntime from the quantized model, or the files of a model "
        "in pieces. `speed`: "
        "float's processor time over that of int8 on oneDNN, beside other work; the "
        "smallest models spend most of it on calling operators. `seconds`: of the "
        "processor, for all.",
        '<details markdown="1"><summary>All rows</summary>',
        "\n".join([*_head(COLUMNS), *table(built)]),
        "</details>",
        "## What was not built",
        "A configuration with the sizes made small is refused by its own code, or no inputs are "
        "known for it here. That tells nothing about quantization.",
        _table(["architecture", "why"], [(row["name"], row["not built"]) for row in rest]),
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def _by_library(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The name of a library, how many of its architectures work, of how many, and the rest."""
    found = []
    for library in dict.fromkeys(row["name"].partition("/")[0] for row in rows):
        own = [row for row in rows if row["name"].startswith(f"{library}/")]
        built = [row for row in own if "not built" not in row]
        counts = (sum(map(works, built)), len(built), len(own) - len(built))
        found.append((library, *map(str, counts)))
    return found


def _head(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _table(names: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    """Names and messages; empty without a row."""
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join([*_head(names), *lines]) if lines else ""
