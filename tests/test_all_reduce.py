"""Calibration in several processes: each sees its share, and all have the ranges of the whole."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from thinning import LONG
from torch import Tensor, distributed, nn

from torch_quant import InvalidConfig, NotCalibrated, QConfig, Quantizer, SmoothQuant
from torch_quant.quantizer_files import _check_alike

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
def test_a_process_alone(tmp_path: Path) -> None:
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
    again = Quantizer("reference", qconfig=OPTIONS["minmax"])
    again.load_state_dict(quantizer.state_dict())
    quantizer.save(tmp_path / "ranges")
    merged = Quantizer("reference", qconfig=OPTIONS["minmax"])
    merged.merge(quantizer)
    for each in (again, Quantizer.load(tmp_path / "ranges"), merged):
        with pytest.raises(InvalidConfig, match="would count every process's data again"):
            each.all_reduce()
        _equal(each, before)
    quantizer.load_state_dict(before.state_dict())  # other ranges: a share again
    quantizer.all_reduce()
    _equal(quantizer, before)


@pytest.mark.usefixtures("alone")
def test_outside_of_the_group() -> None:
    quantizer = _calibrated("minmax", [_data()])
    with pytest.raises(InvalidConfig, match="process 0 is not in the group that it was given"):
        quantizer.all_reduce(distributed.GroupMember.NON_GROUP_MEMBER)
    quantizer.all_reduce()


def _share(rank: int, store: str, results: Any) -> None:
    """One of two processes, whose quantizers differ."""
    file = distributed.FileStore(store, 2)
    distributed.init_process_group("gloo", store=file, rank=rank, world_size=2)
    found = []
    quantizers = [Quantizer("reference", qconfig=QConfig(observer=("minmax", "histogram")[rank]))]
    quantizers.append(_calibrated("minmax", [_data()]))
    quantizers[1].fallen_back = {"0": "float32"} if rank else {}
    quantizers.append(_calibrated("minmax", [_data()]))
    quantizers[2].overrides = {"0": None} if rank else {}
    for quantizer in quantizers:
        before = quantizer.state.batches
        try:
            quantizer.all_reduce()
        except InvalidConfig as error:
            found.append(str(error))
        assert quantizer.state.batches == before
    results.put(found)
    distributed.destroy_process_group()


@pytest.mark.skipif(not LONG, reason="two processes that import PyTorch: make test-long")
def test_processes_with_other_settings(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_share, args=(rank, str(tmp_path / "store"), results))
        for rank in range(2)
    ]
    for each in processes:
        each.start()
    said = [results.get(timeout=120) for _ in processes]
    for each in processes:
        each.join()
    assert said[0] == said[1]
    for message, what in zip(said[0], ("qconfig", "fallen_back", "overrides"), strict=True):
        assert f"process 1 of the group has {what}=" in message


def test_what_differs_is_named_by_process() -> None:
    one, other = {"fallen_back": {}}, {"fallen_back": {"0": "float32"}}
    _check_alike([one, dict(one)])
    with pytest.raises(
        InvalidConfig, match=r"process 2 .* fallen_back=\{'0': .*process 0 has \{\}"
    ):
        _check_alike([one, one, other])


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
