"""Calibrate and evaluate on a Ray cluster: each task takes a shard of the data.

What the shards recorded is folded into one quantizer with ``merge``: with ``minmax`` these are, bit
for bit, the ranges of one process that saw the same batches. Ray runs a task again whose worker has
died; ``--kill`` kills one in the midst of its shard to show it. A shard is never left out.

Each task captures the model once, so a shard should hold many batches. Here the driver puts the
shards into Ray's object store; a task may as well read a file that every machine can reach.

    pip install -e '.[ray,examples]'
    python examples/ray_calibration.py --kill                # a cluster of this machine alone
    python examples/ray_calibration.py --address auto        # the cluster that is running
"""

from __future__ import annotations

import argparse
import os
import signal
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import print_table
from digits_cnn_ptq import ResidualCNN, accuracy
from digits_data import Digits, load_digits_split, train
from torch import nn

from torch_quant import Quantizer

try:
    import ray
except ImportError:
    raise SystemExit("Ray is not installed: pip install -e '.[ray]'") from None

__all__ = ["Attempts", "calibrated", "evaluated", "sharded"]

BATCH = 32
ATTEMPTS = 3
"""Times that a task is tried again when its worker dies, on another machine if this one is gone."""


@ray.remote(num_cpus=0)
class Attempts:
    """How often each shard was begun."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def begin(self, shard: int) -> int:
        self.counts[shard] += 1
        return self.counts[shard]

    def all(self) -> dict[int, int]:
        return dict(self.counts)


@ray.remote(max_retries=ATTEMPTS)
def _calibrate(
    model: nn.Module,
    data: Digits,
    settings: Mapping[str, Any],
    shard: int,
    attempts: Any,
    kills: int,
) -> dict[str, Any]:
    """The ranges of one shard: plain values and tensors, a few kB."""
    attempt = ray.get(attempts.begin.remote(shard))
    torch.set_num_threads(1)
    quantizer = Quantizer.from_config(settings)
    calib_model = quantizer.calib(model)
    for images in data.images.split(BATCH):
        with torch.no_grad():
            calib_model(images)
        if attempt <= kills:
            os.kill(os.getpid(), signal.SIGKILL)  # nothing is cleaned up, as when memory runs out
    return quantizer.state_dict()


@ray.remote(max_retries=ATTEMPTS)
def _right(model: nn.Module, data: Digits) -> int:
    """How many images of one shard are told right."""
    torch.set_num_threads(1)
    with torch.no_grad():
        found = [model(images).argmax(1) for images in data.images.split(BATCH)]
    return int((torch.cat(found) == data.labels).sum())


def sharded(data: Digits, shards: int) -> list[Digits]:
    """``data`` in whole batches, in turn: the batches are those that one process would see."""
    pairs = list(zip(data.images.split(BATCH), data.labels.split(BATCH), strict=True))
    if not 1 <= shards <= len(pairs):
        raise SystemExit(f"--shards {shards}: there are {len(pairs)} batches, give 1 to that many")
    parts = [pairs[i::shards] for i in range(shards)]
    return [Digits(*(torch.cat(list(each)) for each in zip(*part, strict=True))) for part in parts]


def calibrated(
    model: nn.Module,
    shards: Sequence[Digits],
    settings: Mapping[str, Any],
    attempts: Any,
    *,
    kills: Mapping[int, int] | None = None,
) -> Quantizer:
    """A quantizer with the ranges of all shards, each of which is a task.

    Args:
        model: sent to each machine once.
        shards: images ``[n, 1, 8, 8]`` of each.
        settings: as of ``Quantizer.from_config``, the same for every shard.
        attempts: an :class:`Attempts`.
        kills: how many workers are killed, by the shard that they calibrate on.

    Raises:
        ray.exceptions.WorkerCrashedError: the workers of a shard died more than :data:`ATTEMPTS`
            times. No ranges are given then, rather than those of fewer data.
    """
    kills = kills or {}
    sent = ray.put(model)
    tasks = [
        _calibrate.remote(sent, ray.put(data), settings, i, attempts, kills.get(i, 0))
        for i, data in enumerate(shards)
    ]
    quantizer = Quantizer.from_config(settings)
    for task in tasks:  # in order, so that every run folds in the same order
        quantizer.merge(ray.get(task))
    return quantizer


def evaluated(model: nn.Module, shards: Sequence[Digits]) -> float:
    """The share of all images that ``model``, float or quantized, tells right."""
    sent = ray.put(model)
    right = ray.get([_right.remote(sent, ray.put(data)) for data in shards])
    return sum(right) / sum(len(data.labels) for data in shards)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", help="a running cluster; default: begin one here")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--observer", default="minmax", help="minmax, histogram, ...")
    parser.add_argument("--kill", action="store_true", help="kill a worker, to see it replaced")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("out/ray_ranges"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor")
    torch.set_num_threads(1)

    training, held_out = load_digits_split()
    calibration = Digits(training.images[:512], training.labels[:512])
    shards = sharded(calibration, options.shards)
    torch.manual_seed(0)
    model = train(ResidualCNN(), training, epochs=options.epochs)
    settings = {"qconfig": {"observer": options.observer}}

    ray.init(options.address, **({} if options.address else {"num_cpus": 2}))
    attempts = Attempts.remote()
    quantizer = calibrated(model, shards, settings, attempts, kills={0: 1} if options.kill else {})
    begun = ray.get(attempts.all.remote())
    print(f"{len(shards)} shards, begun {sum(begun.values())} times: {begun}")
    quantizer.save(options.output)

    quant_model = quantizer.quantize(model, example_inputs=(held_out.images[:BATCH],))
    parts = sharded(held_out, options.shards)
    print_table(
        [
            (
                "held-out accuracy, over shards",
                f"{evaluated(model, parts):.2%}",
                f"{evaluated(quant_model, parts):.2%}",
            ),
            (
                "held-out accuracy, in one process",
                f"{accuracy(model, held_out):.2%}",
                f"{accuracy(quant_model, held_out):.2%}",
            ),
        ],
        "float32",
        "int8",
    )
    print(f"{options.output}: Quantizer.load takes the ranges of all shards")


if __name__ == "__main__":
    main()
