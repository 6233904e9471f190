"""Two processes that train on halves of a batch do what one does on the whole batch.

By DistributedDataParallel, and by FSDP2, where each has half of every weight.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from capturing_once import shared_exports
from models import MODELS, example
from qat_training import FOUR_BITS
from torch import multiprocessing, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from torch_quant import QatSchedule, Quantizer

pytestmark = [
    pytest.mark.usefixtures("grad"),
    pytest.mark.long("twelve seconds of two processes"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed"),
]

STEPS = 3
OBSERVED = (0, 2)
"""For how many steps ranges are observed."""
SHARDED = "sharded"


def _left_to_divide(mesh: DeviceMesh) -> float:
    """By what FSDP2 leaves gradients to be divided: on gloo, that of torch 2.8 sums them."""
    layer = fully_shard(nn.Linear(2, 2, bias=False), mesh=mesh)
    layer(torch.ones(1, 2)).sum().backward()
    assert isinstance(layer.weight.grad, DTensor)
    return float(layer.weight.grad.full_tensor()[0, 0])  # the mean is 1


def _sharded(qat_model: nn.Module) -> Callable[[], None]:
    """Shard a QAT model, but for its scalar scales; what is to be called before each step."""
    scalars = [each for each in qat_model.parameters() if each.dim() == 0]
    mesh = init_device_mesh("cpu", (2,))
    left = _left_to_divide(mesh)
    assert left in (1.0, 2.0)
    fully_shard(qat_model, mesh=mesh, ignored_params=set(scalars))

    def reduce() -> None:
        for each in qat_model.parameters():
            if isinstance(each, DTensor) and each.grad is not None:
                each.grad /= left
        for scale in scalars:
            assert scale.grad is not None
            torch.distributed.all_reduce(scale.grad)
            scale.grad /= 2

    return reduce


def _trained(
    rank: int, world: int, observed: int, sharded: bool = False
) -> dict[str, torch.Tensor]:
    """What one of ``world`` processes has after ``STEPS`` steps, on its part of the batch."""
    model, (x,) = MODELS["mobile_cnn"](), example("mobile_cnn", 8)
    quantizer = Quantizer("reference", qconfig=FOUR_BITS)
    with torch.no_grad():
        quantizer.calib(model)(x)
    qat_model = quantizer.qat(model).train()
    reduce = _sharded(qat_model) if sharded else lambda: None
    plain = sharded or world == 1
    trained: nn.Module = qat_model if plain else DistributedDataParallel(qat_model)
    schedule = QatSchedule(qat_model, observe_until=observed, freeze_bn_at=0)
    groups = quantizer.parameter_groups(qat_model, lr=1e-2, scale_lr=1e-3)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    part = (x * 2).chunk(world)[rank]
    for _ in range(STEPS):
        optimizer.zero_grad()
        trained(part).square().mean().backward()
        reduce()
        optimizer.step()
        schedule.step()
    if world > 1:
        # Before DDP goes, with this call, and the group behind it: DDP's destructor waits for
        # gloo's thread with Python's lock held, which that thread may be waiting for.
        torch.distributed.barrier()
    found = qat_model.state_dict()
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}


def _both(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    with shared_exports():
        for observed in OBSERVED:
            torch.save(_trained(rank, 2, observed), Path(folder) / f"{observed}_{rank}.pt")
        torch.save(_trained(rank, 2, 0, sharded=True), Path(folder) / f"{SHARDED}_{rank}.pt")
    torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the states of two processes, which start once for all tests."""
    path = tmp_path_factory.mktemp("states")
    multiprocessing.spawn(_both, (_free_port(), str(path)), nprocs=2)
    return path


@pytest.mark.parametrize("how", [*OBSERVED, SHARDED])
def test_two_processes_are_one(folder: Path, how: int | str) -> None:
    """Batch norms are frozen: those of PyTorch normalize the part that each process has."""
    one = _trained(0, 1, how if isinstance(how, int) else 0)
    first, second = (torch.load(folder / f"{how}_{rank}.pt", weights_only=True) for rank in (0, 1))
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
