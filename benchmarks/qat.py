"""What a step of training through the quantization costs, against one of the float model.

A step is forward, backward and AdamW. Steps of both models take turns in one process, in processor
time, so that their ratio holds on a busy machine. The memory of each is the peak of a process of
its own, less what that process took before it had a model.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import minilm, minilm_inputs, report
from torch import Tensor, nn

from torch_quant import QatSchedule, QConfig, Quantizer, QuantSpec, recipes

Step = Callable[[], None]
KINDS = ("float", "qat")


def _outputs(outputs: Any) -> Tensor:
    found: Tensor = getattr(outputs, "last_hidden_state", outputs)
    return found


def stepping(model: nn.Module, groups: Any, inputs: dict[str, Tensor]) -> Step:
    """One step on the inputs; the loss depends on every output."""
    optimizer = torch.optim.AdamW(groups, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        _outputs(model(**inputs)).square().mean().backward()
        optimizer.step()

    return step


def weights(bits: int) -> QuantSpec:
    return QuantSpec.of(bits=bits, signed=True, symmetric=True, per_channel=True)


def digits() -> tuple[nn.Module, dict[str, Tensor], QConfig]:
    """The depthwise CNN of the example; 4 bits."""
    from qat_digits import DepthwiseCNN

    torch.manual_seed(0)
    qconfig = QConfig(input=QuantSpec.of(bits=4), weight=weights(4))
    return DepthwiseCNN(), {"x": torch.rand(64, 1, 8, 8)}, qconfig


def images() -> tuple[nn.Module, dict[str, Tensor], QConfig]:
    """The same CNN, wider, on images of 32 x 32, where kernels and not calls take the time."""
    from qat_digits import DepthwiseCNN

    torch.manual_seed(0)
    qconfig = QConfig(input=QuantSpec.of(bits=4), weight=weights(4))
    return DepthwiseCNN((64, 128, 256), 3), {"x": torch.rand(32, 1, 32, 32)}, qconfig


def sentences() -> tuple[nn.Module, dict[str, Tensor], QConfig]:
    """The pretrained MiniLM, 8 texts of 64 tokens; 8 bits."""
    return minilm(), minilm_inputs(8, 64), recipes.fast()


CASES = {"digits CNN": digits, "wide CNN": images, "MiniLM": sentences}


def made(case: str, method: str, kinds: tuple[str, ...]) -> dict[str, Step]:
    """A step of each kind."""
    model, inputs, qconfig = CASES[case]()
    steps = {}
    if "float" in kinds:
        floating = copy.deepcopy(model).train()
        steps["float"] = stepping(floating, floating.parameters(), inputs)
    for kind in set(kinds) - {"float"}:
        quantizer = Quantizer("reference", qconfig=qconfig)
        with torch.no_grad():
            quantizer.calib(model.eval())(**inputs)
        qat_model = quantizer.qat(model, method).train()
        if kind == "qat, norms frozen":
            QatSchedule(qat_model, freeze_bn_at=0)
        groups = quantizer.parameter_groups(qat_model, lr=1e-4, scale_lr=1e-5)
        steps[kind] = stepping(qat_model, groups, inputs)
    return steps


def in_turns(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median milliseconds of processor time of each; there is one thread."""
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for turn in range(rounds + 2):
        for kind, step in steps.items():
            start = time.process_time()
            step()
            if turn >= 2:
                times[kind].append((time.process_time() - start) * 1e3)
    return {kind: statistics.median(found) for kind, found in times.items()}


def _kilobytes(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def peak(case: str, method: str, kind: str) -> float:
    """Megabytes that three steps take at most, with the model; Linux."""
    CASES[case]()  # whatever is imported
    _trim()
    before = _kilobytes("VmRSS")
    step = made(case, method, (kind,))[kind]
    _trim()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step()
    return (_kilobytes("VmHWM") - before) / 1024


def _trim() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peaks(case: str, method: str, kinds: tuple[str, ...]) -> dict[str, float]:
    """The same of each kind, in processes of their own."""
    found = {}
    for kind in kinds:
        command = [sys.executable, __file__, "--peak", case, kind, "--method", method]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[kind] = float(done.stdout.split()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="lsq")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "KIND"), help="memory of one alone")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor")
    torch.set_num_threads(1)
    if options.peak:
        print(peak(options.peak[0], options.method, options.peak[1]))
        return
    rows = []
    for case in options.cases:
        kinds = KINDS if case == "MiniLM" else (*KINDS, "qat, norms frozen")
        rounds = options.rounds if case == "MiniLM" else options.rounds * 4
        times = in_turns(made(case, options.method, kinds), rounds)
        memory = peaks(case, options.method, kinds)
        rows += [
            {
                "model": case,
                "step": kind,
                "ms": times[kind],
                "x float": times[kind] / times["float"],
                "peak MB": memory[kind],
                "memory x float": memory[kind] / memory["float"],
            }
            for kind in kinds
        ]
    report("qat", rows, method=options.method)


if __name__ == "__main__":
    main()
