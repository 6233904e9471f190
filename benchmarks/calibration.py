"""What calibrating and quantizing cost on MiniLM, against its float forward; and importing."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
from harness import interleaved_latency, minilm, minilm_inputs, report

from torch_quant import QConfig, Quantizer
from torch_quant.statistics import OBSERVERS


def import_seconds(statement: str, repeats: int = 5) -> float:
    """Median time of ``statement`` in a fresh process, after ``import torch``."""
    code = (
        f"import time, torch; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(repeats)
    ]
    return statistics.median(float(run.stdout) for run in runs)


def measure(observer: str, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    """One row: float and calibrating forward in turns, and the seconds of what is done once."""
    quantizer = Quantizer(qconfig=QConfig(observer=observer))
    calib_model = quantizer.calib(model)
    start = time.perf_counter()
    with torch.no_grad():
        calib_model(**inputs)
    capture = time.perf_counter() - start
    times = interleaved_latency(
        {"float": lambda: model(**inputs), "calib": lambda: calib_model(**inputs)}, rounds=9
    )
    start = time.perf_counter()
    quantizer.quantize(model)
    return {
        "observer": observer,
        "float ms": times["float"],
        "calib ms": times["calib"],
        "ratio": times["calib"] / times["float"],
        "capture s": capture,
        "quantize s": time.perf_counter() - start,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor")
    torch.set_num_threads(1)
    model, inputs = minilm(), minilm_inputs()
    rows = [measure(observer, model, inputs) for observer in sorted(OBSERVERS)]
    seconds = import_seconds("import torch_quant")
    report("calibration", rows, **{"import torch_quant s": round(seconds, 3)})


if __name__ == "__main__":
    main()
