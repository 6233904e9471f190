"""Latency of float and int8 by runtime, each model in one process, its ways called in turns.

Without options: all-MiniLM-L6-v2 and ResNet-50, eager float32 beside the best backend of this
machine. ``--all`` takes every model and every way that is installed here; other tools come from
``make bench-peers``. ``--backend ipex`` runs in IPEX's environment, beside its own float32.

Times are of single calls, between which the others run: the median, and the 90th percentile in the
file. With one thread they are processor time, in which other processes count little. The second
number of a cell is that of calls of two sizes in turn, as servers see them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import conditions, keep, kept_rows, rows_beside, with_cells
from latency_models import MODELS
from latency_ways import OURS, WAYS, Run, Setting, first, offered, quiet
from tabulate import tabulate
from tqdm import tqdm

from torch_quant import Quantizer, sqnr

BASE = "float32"
DEFAULT = ("MiniLM-L6, 8 x 128", "ResNet-50, 1")
REST = 0.05
"""Seconds until no thread of an earlier call looks for work."""
ALIKE = ("cpu", "instruction set", "threads", "torch")
"""Conditions that all rows of a file share."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--models", choices=MODELS, **several, help=f"of: {'; '.join(MODELS)}")
    parser.add_argument("--ways", choices=WAYS, **several, help=f"of: {'; '.join(WAYS)}")
    parser.add_argument("--all", action="store_true", help="all models, all ways")
    alone = f"ours alone, beside float32, of: {', '.join(OURS)}; default: the best here"
    parser.add_argument("--backend", choices=OURS, metavar="NAME", help=alone)
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing a model (default 8)")
    parser.add_argument("--out", default=None, help="name of the file in results/")
    parser.add_argument("--plot", type=Path, help="write a chart of the speed-ups there")
    parser.add_argument(
        "--add", action="store_true", help="keep what results/ has of other models and ways"
    )
    parser.add_argument("--kept", action="store_true", help="show results/ again, run nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a model, in a process of its own
    options = parser.parse_args()
    if options.models is None:
        options.models = list(MODELS if options.all else DEFAULT)
    if options.ways is None:
        options.ways = list(WAYS)
        if not options.all:
            options.ways = [BASE, options.backend or Quantizer().backend.name.lower()]
            if options.ways[1] not in WAYS:
                parser.error(
                    f"the best backend here, {options.ways[1]}, has no kernels of its own: "
                    f"--backend, of {', '.join(OURS)}"
                )
    return options


def ready(setting: Setting, ways: list[str]) -> tuple[dict[str, Run], dict[str, Any]]:
    """What can be called, and of each way the seconds it took to make ready, or why it cannot."""
    runs: dict[str, Run] = {}
    notes: dict[str, Any] = {}
    missing = offered()
    for name in tqdm(ways, desc="making ready", leave=False):
        if missing[name]:
            notes[name] = f"{missing[name]} is not installed"
            continue
        start = time.perf_counter()
        try:
            run = WAYS[name](setting)
            for given in setting.sizes:
                run(given)
        except Exception as error:  # the row says so, whatever another tool raises
            said = str(error).strip().splitlines() or [""]
            notes[name] = f"{type(error).__name__}: {said[0][:160]}"
        else:
            runs[name], notes[name] = run, round(time.perf_counter() - start, 1)
    return runs, notes


def timed(runs: dict[str, Run], sizes: list[Any], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of calls in turns, each in another order and behind a call that is not timed.

    Threads that a way has started look for more work for a while, on cores that others want: with
    several threads there is a rest between ways.
    """
    alone = torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in runs}
    sample, turn, end = random.Random(0).sample, 0, time.perf_counter() + seconds
    while turn < 5 or (time.perf_counter() < end and turn < 200):
        given = sizes[turn % len(sizes)]
        for name, run in sample(list(runs.items()), len(runs)):
            time.sleep(0.0 if alone else REST)
            run(sizes[(turn - 1) % len(sizes)])
            start = clock()
            run(given)
            found[name].append((clock() - start) * 1e3)
        turn += 1
    return found


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one model."""
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(MODELS[name], Path(folder), options.threads)
        runs, notes = ready(setting, options.ways)
        given = setting.sizes[0]
        expected = first(runs[BASE](given))
        errors = {way: float(sqnr(expected, first(run(given)))) for way, run in runs.items()}
        alone = timed(runs, [given], options.seconds / 2)
        turns = timed(runs, setting.sizes, options.seconds / 2)
    cells = {}
    for way, times in alone.items():
        ms = statistics.median(times)
        cells[way] = {
            "ms": ms,
            "p90 ms": statistics.quantiles(times, n=10)[-1],
            "speed-up": statistics.median(alone[BASE]) / ms,
            "two sizes, speed-up": statistics.median(turns[BASE]) / statistics.median(turns[way]),
            "SQNR dB": errors[way] if way != BASE else None,
            "ready in s": notes.pop(way),
        }
    return {"model": name, "ways": cells, "not run": notes}


def apart(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same in a new process: compilers and runtimes keep much."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--one", file.name, "--models", name]
        command += ["--ways", *options.ways, "--threads", str(options.threads)]
        subprocess.run([*command, "--seconds", str(options.seconds)], check=True)
        found: dict[str, Any] = json.loads(Path(file.name).read_text())
        return found


def cell(row: dict[str, Any], way: str) -> str:
    """Milliseconds of float32; else its time over that of one size, and of two in turn."""
    found = row["ways"].get(way)
    if found is None:
        return "-"
    if way == BASE:
        return f"{found['ms']:.3g} ms"
    return f"{found['speed-up']:.2f}, {found['two sizes, speed-up']:.2f}"


def show(rows: list[dict[str, Any]]) -> None:
    """A table in Markdown, a line for each model, and what could not run."""
    ways = [way for way in WAYS if any(way in row["ways"] for row in rows)]
    table = [[row["model"], *(cell(row, way) for way in ways)] for row in rows]
    print("Speed-ups over eager float32: of one size, and of two sizes in turn.\n")
    print(tabulate(table, headers=["", *ways], tablefmt="github", disable_numparse=True))
    for row in rows:
        for way, why in row["not run"].items():
            print(f"{row['model']}: no {way}: {why}")


MARKS = {
    "float32, compiled": ("gray", "|"),
    "bfloat16": ("gray", "x"),
    "onnxruntime float32": ("gray", "1"),
    "openvino float32": ("gray", "2"),
    "onednn": ("tab:blue", "o"),
    "onednn, dynamic": ("tab:blue", "v"),
    "inductor": ("tab:orange", "o"),
    "openvino": ("tab:purple", "o"),
    "our file in bare openvino": ("tab:purple", "^"),
    "onnxruntime": ("tab:green", "o"),
    "ipex": ("tab:red", "o"),
    "onnxruntime's static": ("tab:green", "s"),
    "onnxruntime's dynamic": ("tab:green", "D"),
    "nncf in openvino": ("tab:purple", "s"),
    "torchao, inductor": ("tab:orange", "s"),
}
"""Way -> color and marker: gray is float, disks and triangles are ours, squares and diamonds are
other tools'."""


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The speed-ups, a line of dots for each model."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9.5, 1.6 + 0.42 * len(rows)))
    for way, (color, marker) in MARKS.items():
        found = [
            (row["ways"][way]["speed-up"], i) for i, row in enumerate(rows) if way in row["ways"]
        ]
        if found:
            ours = marker in "ov^"
            axes.scatter(
                *zip(*found, strict=True), c=color if ours or marker not in "sD" else "none",
                edgecolors=None if marker in "|x12" else color, marker=marker, s=44, label=way,
                zorder=3 if ours else 2,
            )  # fmt: skip
    axes.axvline(1.0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", linewidth=0.4)
    axes.set_xlabel("times faster than eager float32, one thread")
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    options = parse()
    quiet()
    if options.one:
        Path(options.one).write_text(json.dumps(measure(options.models[0], options)))
        return
    if BASE not in options.ways:
        options.ways = [BASE, *options.ways]
    name = options.out or (f"latency_{options.backend}" if options.backend else "latency")
    if options.all:
        name = options.out or "latency_all"
    torch.set_num_threads(options.threads)
    clock = "processor time" if options.threads == 1 else "elapsed time"
    rows = kept_rows(name, {}) if options.kept else []
    if options.add:
        rows = rows_beside(name, {key: conditions()[key] for key in ALIKE})
    if not options.kept:
        for each in tqdm(options.models, desc="models", unit="model"):
            rows = with_cells(rows, apart(each, options))
            facts = keep(name, rows, clock=clock)
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    show(rows)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
