"""What every benchmark shares: its conditions, timing in turns, a table and a JSON file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import torch_quant

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from common import interleaved_latency
from minilm_data import model_folder

__all__ = [
    "conditions",
    "interleaved_latency",
    "keep",
    "kept_rows",
    "minilm",
    "minilm_inputs",
    "onnxruntime_session",
    "peak_memory",
    "report",
    "resident",
    "rows_beside",
    "with_cells",
]

RESULTS = Path(__file__).parent / "results"


def conditions() -> dict[str, Any]:
    """Hardware, threads and versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "vnni": bool(torch.cpu._is_vnni_supported()),
        "threads": torch.get_num_threads(),
        "pinned to": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_quant": torch_quant.__version__,
        "date": datetime.date.today().isoformat(),
    }


def report(name: str, rows: list[dict[str, Any]], **notes: Any) -> None:
    """Print the conditions and the rows, and keep both in ``results/<name>.json``."""
    facts = keep(name, rows, **notes)
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    print(tabulate(rows, headers="keys", floatfmt=".4g"))


def keep(name: str, rows: list[dict[str, Any]], **notes: Any) -> dict[str, Any]:
    """Write ``results/<name>.json``; returns the conditions, ``notes`` among them."""
    facts = conditions() | notes
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps({"conditions": facts, "rows": rows}, indent=1) + "\n")
    partial.replace(path)
    return facts


def kept_rows(name: str, notes: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of ``results/<name>.json``, if they were made with these notes."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    same = all(found["conditions"].get(key) == value for key, value in notes.items())
    return list(found["rows"]) if same else []


def rows_beside(name: str, notes: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of ``results/<name>.json``, to which others are added.

    Args:
        name: of the file; there may be none yet.
        notes: conditions of the new rows, which have to be those of the old ones.

    Raises:
        SystemExit: they are others, and :func:`keep` would tell the new ones of all rows.
    """
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    for key, value in notes.items():
        if (was := found["conditions"].get(key)) != value:
            raise SystemExit(
                f"{path}: its rows were measured with {key} {was!r}, and now it is {value!r}: give "
                "another name by --out, or measure all anew"
            )
    return list(found["rows"])


def with_cells(rows: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with the cells of ``new`` in the place of older ones of its model.

    >>> with_cells([{"model": "m", "ways": {"a": 1}, "not run": {}}],
    ...            {"model": "m", "ways": {"b": 2}, "not run": {}})
    [{'model': 'm', 'ways': {'a': 1, 'b': 2}, 'not run': {}}]
    """
    old = next((row for row in rows if row["model"] == new["model"]), None)
    if old is None:
        return [*rows, new]
    reasons = {way: why for way, why in old["not run"].items() if way not in new["ways"]}
    merged = new | {"ways": old["ways"] | new["ways"], "not run": reasons | new["not run"]}
    return [merged if row is old else row for row in rows]


def minilm() -> torch.nn.Module:
    """The pretrained all-MiniLM-L6-v2, eval mode."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModel.from_pretrained(model_folder()).eval()


def minilm_inputs(batch: int = 8, length: int = 128) -> dict[str, torch.Tensor]:
    """Token ids and a mask with a few zeros."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length * 3 // 4 :] = 0
    ids = torch.randint(1000, 20000, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}


def onnxruntime_session(path: Path, threads: int = 1) -> Any:
    """The file on onnxruntime's CPU provider."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _status(key: str) -> float:
    """MB that the system says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def resident() -> float:
    """MB that this process has; Linux alone."""
    return _status("VmRSS")


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """A function that says how many MB the process has grown at most since; Linux alone."""
    if not Path("/proc/self/clear_refs").exists():
        yield lambda: float("nan")
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
    before = resident()
    yield lambda: _status("VmHWM") - before
