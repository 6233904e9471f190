"""Memory of float and int8 by runtime, the models and ways of ``latency.py``.

Each way of each model has a process of its own, in which two figures are taken, both beside what
the process had before the model was made:

- peak: the most that it grew until the way had answered calls of two sizes. The float model, the
  calibration and the files that are made on the way are in it.
- serving: what is left of it once all is dropped that calls do not need.

Memory is that of the process alone, mapped files among it. Each way has run on a small network
before, so that what it imports does not count. Linux alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import keep, kept_rows, peak_memory, resident, with_cells
from latency_models import MODELS, Case, Inputs
from latency_ways import WAYS, Setting, offered, quiet
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

NAME = "memory"
LEFT_OUT = ("our file in bare openvino",)
"""Ways whose process holds what another way makes."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = [way for way in WAYS if way not in LEFT_OUT]
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument(
        "--models", choices=MODELS, default=list(MODELS), **several, help=f"of: {'; '.join(MODELS)}"
    )
    parser.add_argument(
        "--ways", choices=ways, default=ways, **several, help=f"of: {'; '.join(ways)}"
    )
    parser.add_argument("--kept", action="store_true", help="show results/ again, run nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a way, in a process of its own
    return parser.parse_args()


def measure(model: str, way: str) -> dict[str, float]:
    """MB of one way, in this process."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    MODELS[model].make()  # what it imports stays
    with tempfile.TemporaryDirectory() as folder:
        warm = Setting(Case(_small, _small_sizes), Path(folder))
        WAYS[way](warm)(warm.sizes[0])
        del warm
    _give_back()
    with tempfile.TemporaryDirectory() as folder, peak_memory() as peak:
        before = resident()
        setting = Setting(MODELS[model], Path(folder))
        sizes, weights = setting.sizes, _bytes(setting.model)
        run = WAYS[way](setting)
        for given in sizes:
            run(given)
        grown = peak()
        del setting
        _give_back()
        for given in sizes:
            run(given)
        return {"model MB": weights, "peak MB": grown, "serving MB": resident() - before}


def _small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()


def _small_sizes() -> list[Inputs]:
    return [{"input": torch.ones(count, 64)} for count in (2, 3)]


def _give_back() -> None:
    """Free what nobody holds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _bytes(model: nn.Module) -> float:
    """MB of the weights."""
    return sum(x.nbytes for x in model.state_dict().values()) / 2**20


def apart(model: str, way: str) -> dict[str, float] | str:
    """The same in a new process; what it says where it cannot."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--one", file.name, "--models", model, "--ways", way]
        ran = subprocess.run(command, check=False, capture_output=True, text=True)
        if ran.returncode:
            said = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
            return said[-1][:160]
        found: dict[str, float] = json.loads(Path(file.name).read_text())
        return found


def row_of(model: str, ways: list[str]) -> dict[str, Any]:
    missing = offered()
    cells: dict[str, Any] = {}
    notes: dict[str, str] = {}
    for way in tqdm(ways, desc=model, leave=False):
        found = f"{missing[way]} is not installed" if missing[way] else apart(model, way)
        if isinstance(found, str):
            notes[way] = found
        else:
            cells[way] = found
    return {"model": model, "ways": cells, "not run": notes}


def show(rows: list[dict[str, Any]]) -> None:
    """A table in Markdown: peak and serving MB of each model and way."""
    ways = [way for way in WAYS if any(way in row["ways"] for row in rows)]
    table = []
    for row in rows:
        weights = max((cell["model MB"] for cell in row["ways"].values()), default=0.0)
        cells = [row["ways"].get(way) for way in ways]
        told = ["-" if c is None else f"{c['peak MB']:.0f}, {c['serving MB']:.0f}" for c in cells]
        table.append([row["model"], f"{weights:.0f}", *told])
    print("MB that a process grows by: at most until it is ready, and while it serves.\n")
    head = ["", "weights in float32", *ways]
    print(tabulate(table, headers=head, tablefmt="github", disable_numparse=True))
    for row in rows:
        for way, why in row["not run"].items():
            print(f"{row['model']}: no {way}: {why}")


def main() -> None:
    options = parse()
    quiet()
    if options.one:
        found = measure(options.models[0], options.ways[0])
        Path(options.one).write_text(json.dumps(found))
        return
    rows = kept_rows(NAME, {})
    if not options.kept:
        for model in tqdm(options.models, desc="models", unit="model"):
            rows = with_cells(rows, row_of(model, options.ways))
            keep(NAME, rows)
    show(rows)


if __name__ == "__main__":
    main()
