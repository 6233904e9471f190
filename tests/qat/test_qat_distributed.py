"""Two processes that train on halves of a batch do what one does on the whole batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from models import MODELS, example
from qat_training import FOUR_BITS
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from torch_quant import QatSchedule, Quantizer

pytestmark = [
    pytest.mark.usefixtures("grad"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed"),
]

STEPS = 3


def _train(rank: int, world: int, port: int, folder: str, observed: int) -> None:
    torch.set_num_threads(1)
    model, (x,) = MODELS["mobile_cnn"](), example("mobile_cnn", 8)
    quantizer = Quantizer("reference", qconfig=FOUR_BITS)
    with torch.no_grad():
        quantizer.calib(model)(x)
    qat_model = quantizer.qat(model).train()
    trained: nn.Module = qat_model
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
        trained = DistributedDataParallel(qat_model)
    schedule = QatSchedule(qat_model, observe_until=observed, freeze_bn_at=0)
    groups = quantizer.parameter_groups(qat_model, lr=1e-2, scale_lr=1e-3)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    part = (x * 2).chunk(world)[rank]
    for _ in range(STEPS):
        optimizer.zero_grad()
        trained(part).square().mean().backward()
        optimizer.step()
        schedule.step()
    torch.save(qat_model.state_dict(), Path(folder) / f"{world}_{rank}.pt")
    if world > 1:
        # Before the group: the last reference to it must not be that of DDP, whose destructor waits
        # for gloo's thread with Python's lock held, which that thread may be waiting for.
        torch.distributed.barrier()
        del trained
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _states(folder: Path, observed: int) -> list[dict[str, torch.Tensor]]:
    """Of one process by itself, and of two."""
    for world in (1, 2):
        args = (world, _free_port(), str(folder), observed)
        multiprocessing.spawn(_train, args, nprocs=world)
    return [torch.load(folder / f"{x}.pt", weights_only=True) for x in ("1_0", "2_0", "2_1")]


@pytest.mark.parametrize("observed", [0, 2])
def test_two_processes_are_one(tmp_path: Path, observed: int) -> None:
    """Batch norms are frozen: those of PyTorch normalize the part that each process has."""
    one, first, second = _states(tmp_path, observed)
    moved = 0
    for name, x in one.items():
        assert torch.equal(first[name], second[name]), name  # both have all gradients
        # Means of halves against the mean of all. A sum that rounds the other way may move a value
        # over a border, so that one gradient in a thousand is another: hence relative to the whole.
        distance = (first[name].double() - x.double()).norm() / x.double().norm().clamp(min=1e-6)
        assert float(distance) < 1e-4, name
        moved += int(name.endswith("_scale"))
    assert moved > 10
    # The extremes of a tensor that no weight comes before are merged without any rounding.
    ends = next(name for name in one if name.endswith("input_range"))
    assert torch.equal(one[ends], first[ends])
