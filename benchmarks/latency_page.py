"""The tables of docs/latency.md, of what the results of latency.py and memory.py keep.

``python benchmarks/latency_page.py`` prints them: speed-ups with one thread, with two, and on IPEX;
memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from harness import kept_rows

__all__ = ["memory_table", "speed_table"]

Row = dict[str, Any]
NAMES = {
    "float32": "eager float32",
    "float32, compiled": "`torch.compile`, frozen",
    "bfloat16": "the model in bfloat16",
    "onednn": "**ONEDNN**",
    "inductor": "**INDUCTOR**",
    "openvino": "**OPENVINO**",
    "onnxruntime": "**ONNXRUNTIME**",
    "ipex": "**IPEX**",
    "onednn, dynamic": "ONEDNN, `int8_dynamic`",
    "our file in bare openvino": "our ONNX file, OpenVINO alone",
    "onnxruntime float32": "onnxruntime, float32",
    "onnxruntime's static": "onnxruntime's static int8",
    "onnxruntime's dynamic": "onnxruntime's dynamic int8",
    "openvino float32": "OpenVINO, float32",
    "nncf in openvino": "NNCF in OpenVINO",
    "torchao, inductor": "torchao PT2E, Inductor",
}
"""Column of the results -> what the page calls it, in the order of its lines."""
_NEAR = 15.0
"""dB; what is farther from float is told in its cell."""
_WIDE = 7
"""Models of one table."""


def speed_table(rows: list[Row]) -> str:
    """A line for each way: times as fast as eager float32, the fastest of a model bold.

    >>> cell = {"ms": 2.0, "speed-up": 1.0, "SQNR dB": None}
    >>> fast = {"ms": 1.0, "speed-up": 2.0, "SQNR dB": 9.0}
    >>> print(speed_table([{"model": "m", "ways": {"float32": cell, "onednn": fast}}]))
    | | m |
    |---|---|
    | eager float32 | 2.00 ms |
    | **ONEDNN** | **2.0x** (9 dB) |
    """
    best = {
        row["model"]: max(
            (cell["speed-up"] for way, cell in row["ways"].items() if way != "float32"), default=0.0
        )
        for row in rows
    }

    def told(row: Row, way: str) -> str:
        cell = row["ways"][way]
        if way == "float32":
            return f"{cell['ms']:.3g} ms" if cell["ms"] >= 10 else f"{cell['ms']:.2f} ms"
        text = f"{cell['speed-up']:.1f}x"
        if cell["speed-up"] == best[row["model"]]:
            text = f"**{text}**"
        far = cell["SQNR dB"] is not None and cell["SQNR dB"] < _NEAR
        return f"{text} ({cell['SQNR dB']:.0f} dB)" if far else text

    return _table(rows, told)


def memory_table(rows: list[Row]) -> str:
    """A line for each way: MB at most until it is ready, and while it serves.

    >>> cell = {"model MB": 4.0, "peak MB": 9.6, "serving MB": 5.2}
    >>> print(memory_table([{"model": "m", "ways": {"onednn": cell}}]))
    | | m |
    |---|---|
    | **ONEDNN** | 10, 5 |
    """

    def told(row: Row, way: str) -> str:
        cell = row["ways"][way]
        return f"{cell['peak MB']:.0f}, {cell['serving MB']:.0f}"

    return _table(rows, told)


def _table(rows: list[Row], told: Callable[[Row, str], str]) -> str:
    lines = [
        f"| | {' | '.join(row['model'] for row in rows)} |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for way, name in NAMES.items():
        if any(way in row["ways"] for row in rows):
            cells = [told(row, way) if way in row["ways"] else "-" for row in rows]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for name, table in (
        ("latency_all", speed_table),
        ("latency_two_threads", speed_table),
        ("latency_ipex", speed_table),
        ("memory", memory_table),
    ):
        rows = kept_rows(name, {})
        for first in range(0, len(rows), _WIDE):
            print(f"{name}\n\n{table(rows[first : first + _WIDE])}\n")


if __name__ == "__main__":
    main()
