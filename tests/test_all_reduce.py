"""Calibration in several processes: each sees its share, and all have the ranges of the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from thinning import LONG
from torch import Tensor, distributed, nn

from torch_quant import InvalidConfig, NotCalibrated, QConfig, Quantizer, SmoothQuant

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="PyTorch without gloo",
)
OPTIONS = {
    "minmax": QConfig(),
    "smooth": QConfig(transforms=[SmoothQuant(0.7)]),
    "histogram": QConfig(observer="histogram"),
}
ROWS, BATCH = 48, 4


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()


def _data() -> Tensor:
    return torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(1)).cumsum(0)


def _calibrated(kind: str, batches: list[Tensor]) -> Quantizer:
    quantizer = Quantizer("reference", qconfig=OPTIONS[kind])
    proxy = quantizer.calib(_model())
    for batch in batches:
        proxy(batch)
    return quantizer


def _statistics(quantizer: Quantizer) -> dict[str, dict[str, Tensor]]:
    return {
        f"{key}, {what}": {name: x for name, x in values.items() if isinstance(x, Tensor)}
        for key, kept in quantizer.state.state_dict()["statistics"].items()
        for what, values in kept.items()
    }


def _equal(ours: Quantizer, theirs: Quantizer) -> None:
    found, expected = _statistics(ours), _statistics(theirs)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert all(torch.equal(found[key][name], x) for name, x in values.items()), key
    assert ours.state.batches == theirs.state.batches


def _rank() -> None:
    """What each process of the long test does: its share, one all-reduce, the whole beside it."""
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model, batches = _model(), list(_data().split(BATCH))
    for kind in OPTIONS:
        quantizer = _calibrated(kind, batches[rank::world])
        quantizer.all_reduce()
        whole = _calibrated(kind, batches)
        _equal(quantizer, whole)
        x = _data()[:3]
        quantized = quantizer.quantize(model, example_inputs=x)
        assert torch.equal(quantized(x), whole.quantize(model, example_inputs=x)(x))
        with pytest.raises(InvalidConfig, match="called before"):
            quantizer.all_reduce()
    # One has seen nothing.
    quantizer = _calibrated("minmax", [] if rank == world - 1 else batches[rank :: world - 1])
    quantizer.all_reduce()
    _equal(quantizer, _calibrated("minmax", batches))
    # One has another model: every process is told, and none waits.
    other = Quantizer("reference")
    other.calib(nn.Linear(16, 2) if rank else model)(_data())
    with pytest.raises(InvalidConfig, match="cannot be merged"):
        other.all_reduce()
    print(f"rank {rank} of {world} is done")
    distributed.destroy_process_group()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_process_alone() -> None:
    batches = list(_data().split(BATCH))
    quantizer, before = _calibrated("minmax", batches), _calibrated("minmax", batches)
    first = quantizer.quantize(_model(), example_inputs=batches[0])
    quantizer.all_reduce()
    _equal(quantizer, before)
    assert torch.equal(quantizer.quantize(_model(), example_inputs=batches[0])(batches[0]),
                       first(batches[0]))  # fmt: skip
    with pytest.raises(InvalidConfig, match="would count every process's data again"):
        quantizer.all_reduce()
    _equal(quantizer, before)
    quantizer.load_state_dict(before.state_dict())  # other ranges: a share again
    quantizer.all_reduce()
    _equal(quantizer, before)


@pytest.mark.usefixtures("alone")
def test_without_data() -> None:
    with pytest.raises(NotCalibrated, match="no process has seen data"):
        Quantizer("reference").all_reduce()


def test_without_a_group() -> None:
    with pytest.raises(InvalidConfig, match="start the program with torchrun"):
        _calibrated("minmax", [_data()]).all_reduce()


@pytest.mark.skipif(not LONG, reason="four processes that import PyTorch: make test-long")
@pytest.mark.timeout(0)
def test_four_processes_have_the_ranges_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4",
               __file__]  # fmt: skip
    folder = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(folder.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {line for line in done.stdout.splitlines() if line.startswith("rank")} == {
        f"rank {rank} of 4 is done" for rank in range(4)
    }


if __name__ == "__main__":
    _rank()
