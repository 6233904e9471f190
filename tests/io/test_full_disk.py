"""A disk that is full is told by the file's name, and what was there before is whole.

Files are kept from growing in a process of their own, as PyTorch's own writers end theirs then.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import calibrated
from models import mlp
from onnx_files import needs
from torch import nn

import torch_quant
from torch_quant import (
    InvalidConfig,
    QuantError,
    Quantizer,
    export_onnx,
    export_torchscript,
    recipes,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits of POSIX: run on Linux or macOS")
ROOT = Path(__file__).parents[2]


class Made:
    """A small model, its example and its quantizer."""

    def __init__(self) -> None:
        self.model, self.x = mlp(), torch.ones(4, 16)
        self.quantizer = calibrated(self.model, [((self.x,), {})], backend="reference")

    def quantized(self, backend: str | None = None) -> nn.Module:
        return self.quantizer.quantize(self.model, backend=backend)

    def scores(self) -> Any:
        amp_model = self.quantizer.amp(self.model)
        amp_model(self.x)
        return self.quantizer.sensitivity(amp_model)


def _checkpoint(made: Made, path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).eval().requires_grad_(False)
    ids = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    quantizer = Quantizer("reference", qconfig=recipes.int4_weight_only(group_size=32))
    quant_model = quantizer.quantize(model, example_inputs=ids)
    torch_quant.export_checkpoint(quant_model, path)


QUICK: dict[str, Callable[[Made, Path], Any]] = {
    "model": lambda made, path: torch_quant.save(made.quantized(), path / "model"),
    "summary": lambda made, path: made.quantizer.save_summary(path / "a.json"),
    "torchscript": lambda made, path: export_torchscript(
        made.quantized(), made.x, path / "model.pt"
    ),
}
WRITERS: dict[str, Callable[[Made, Path], Any]] = {
    **QUICK,
    "quantizer": lambda made, path: made.quantizer.save(path / "quantizer"),
    "json": lambda made, path: made.scores().to_json(path / "b.json"),
    "csv": lambda made, path: made.scores().to_csv(path / "c.csv"),
    "plot": lambda made, path: made.scores().plot(path / "d.png"),
    "page": lambda made, path: made.quantizer.report(path / "e.html", made.model),
    "checkpoint": lambda made, path: _checkpoint(made, path / "checkpoint"),
    "onnx": lambda made, path: export_onnx(made.quantized("onnx"), made.x, path / "model.onnx"),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(each): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def fill_up(names: list[str], folder: Path) -> None:
    """Write each, and again while files may have few bytes: none, half of it, all but one."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    made = Made()
    no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in names:
        room = folder / name
        room.mkdir()
        try:
            WRITERS[name](made, room)
        except InvalidConfig as error:
            raise AssertionError(f"{name}: {error}") from error
        before = contents(room)
        size = max(map(len, before.values()))
        once = name == "checkpoint"  # which takes no folder that is there
        for limit in (0, size // 2, size - 1):
            place = room / "new" if once else room
            place.mkdir(exist_ok=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, no_limit[1]))
            try:
                WRITERS[name](made, place)
            except QuantError as error:
                told = str(error)
            else:
                raise AssertionError(f"{name}: written into {limit} bytes")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
            assert told.startswith(f"cannot write {place}/"), told
            assert "File too large; what was there is unchanged. Free space" in told, told
            assert contents(room) == before, f"{name}: {limit} bytes"
            assert len(list(room.rglob("*"))) <= len(before) + 2, f"{name}: {list(room.rglob('*'))}"
        if not once:
            WRITERS[name](made, room)  # as soon as there is room again


def run(names: list[str], folder: Path) -> None:
    code = (
        f"import sys, torch; sys.path[:0] = {[str(ROOT), *map(str, HERE)]!r}\n"
        "torch.set_num_threads(1); torch.set_grad_enabled(False)\n"
        "from pathlib import Path\n"
        "from test_full_disk import fill_up\n"
        f"fill_up({names!r}, Path({str(folder)!r}))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


HERE = (Path(__file__).parent, Path(__file__).parents[1])


def _told(names: list[str], folder: Path, errors: Path) -> None:
    try:
        fill_up(names, folder)
    except BaseException:
        errors.write_text(traceback.format_exc(), encoding="utf-8")
        raise


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_full_disk_is_told_and_nothing_is_half_written(tmp_path: Path) -> None:
    """In a copy of this process, which need not import PyTorch."""
    folder, errors = tmp_path / "full", tmp_path / "errors.txt"
    folder.mkdir()
    process = multiprocessing.get_context("fork").Process(
        target=_told, args=(list(QUICK), folder, errors)
    )
    process.start()
    process.join()
    assert not errors.exists(), errors.read_text(encoding="utf-8")
    assert process.exitcode == 0
    assert {each.name for each in folder.iterdir()} == set(QUICK)


@pytest.mark.long("half a minute of other exporters")
@needs("onnx", "onnxscript", "transformers", "matplotlib")
def test_all_that_writes(tmp_path: Path) -> None:
    run(list(WRITERS), tmp_path)
