"""Calibrate and evaluate on a Ray cluster: Ray Data reads the shards, and a task takes each.

What the shards recorded is folded into one quantizer with ``merge``: with ``minmax`` these are, bit
for bit, the ranges of one process that saw the same batches. Ray runs a task again whose worker has
died; ``--kill`` kills one in the midst of its shard to show it. A shard is never left out.

Each task captures the model once, so a shard should hold many batches. Shards are files in a
folder that every machine can reach, and so are the ranges that each of them gives.

    pip install -e '.[ray,examples]'
    python examples/ray_calibration.py --kill                # a cluster of this machine alone
    python examples/ray_calibration.py --address auto        # the cluster that is running
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import print_table
from digits_cnn_ptq import ResidualCNN, accuracy
from digits_data import Digits, load_digits_split, train
from torch import nn

from torch_quant import Quantizer

try:
    import ray
    import ray.data
except ImportError:
    raise SystemExit("Ray is not installed: pip install -e '.[ray]'") from None

__all__ = ["Attempts", "calibrated", "evaluated", "sharded"]

BATCH = 32
ATTEMPTS = 3
"""Times that a shard is begun again when its worker dies, on another machine if this one is gone;
Ray Data itself would begin for ever, and a worker that its own data kills would never end."""


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


def _calibrate(
    row: Mapping[str, Any],
    model: Any,
    settings: Mapping[str, Any],
    folder: Path,
    attempts: Any,
    kills: Mapping[int, int],
) -> dict[str, Any]:
    """Save the ranges of one shard, a few kB; gives its number and where they are."""
    shard, data = _read(row)
    attempt = ray.get(attempts.begin.remote(shard))
    if attempt > 1 + ATTEMPTS:
        raise RuntimeError(f"the worker of shard {shard} died {attempt - 1} times")
    torch.set_num_threads(1)
    quantizer = Quantizer.from_config(settings)
    calib_model = quantizer.calib(ray.get(model))
    for images in data.images.split(BATCH):
        with torch.no_grad():
            calib_model(images)
        if attempt <= kills.get(shard, 0):
            os.kill(os.getpid(), signal.SIGKILL)  # nothing is cleaned up, as when memory runs out
    quantizer.save(folder / f"ranges-{shard}")
    return {"shard": shard, "ranges": str(folder / f"ranges-{shard}")}


def _tell(row: Mapping[str, Any], model: Any) -> dict[str, int]:
    """How many images of one shard there are, and how many are told right."""
    torch.set_num_threads(1)
    _, data = _read(row)
    with torch.no_grad():
        found = [ray.get(model)(images).argmax(1) for images in data.images.split(BATCH)]
    return {"images": len(data.labels), "right": int((torch.cat(found) == data.labels).sum())}


def _read(row: Mapping[str, Any]) -> tuple[int, Digits]:
    with np.load(io.BytesIO(row["bytes"])) as held:
        return int(held["shard"]), Digits(*(torch.tensor(held[x]) for x in ("images", "labels")))


def sharded(data: Digits, shards: int, folder: Path) -> list[str]:
    """Write ``data`` in whole batches, in turn: the batches are those that one process would see.

    Returns:
        The files, one of each shard.
    """
    pairs = list(zip(data.images.split(BATCH), data.labels.split(BATCH), strict=True))
    if not 1 <= shards <= len(pairs):
        raise SystemExit(f"--shards {shards}: there are {len(pairs)} batches, give 1 to that many")
    files = []
    for i in range(shards):
        images, labels = (torch.cat(each).numpy() for each in zip(*pairs[i::shards], strict=True))
        files.append(str(folder / f"shard-{i}.npz"))
        np.savez(files[-1], shard=i, images=images, labels=labels)
    return files


def _mapped(files: Sequence[str], task: Any) -> list[dict[str, Any]]:
    """What ``task`` gives for each file, which is one row, and a block of its own."""
    rows = ray.data.read_binary_files(list(files)).repartition(len(files))
    return list(rows.map(task).take_all())


def calibrated(
    model: nn.Module,
    files: Sequence[str],
    settings: Mapping[str, Any],
    folder: Path,
    attempts: Any,
    *,
    kills: Mapping[int, int] | None = None,
) -> Quantizer:
    """A quantizer with the ranges of all shards, each of which is a task.

    Args:
        model: sent to each machine once.
        files: images ``[n, 1, 8, 8]`` of each shard, as :func:`sharded` writes them.
        settings: as of ``Quantizer.from_config``, the same for every shard.
        folder: for the ranges of each shard, ``ranges-0`` and so on.
        attempts: an :class:`Attempts`.
        kills: how many workers are killed, by the shard that they calibrate on.

    Raises:
        ray.exceptions.RayError: the workers of a shard died more than :data:`ATTEMPTS` times, or a
            task has failed. No ranges are given then, rather than those of fewer data.
    """
    task = partial(
        _calibrate, model=ray.put(model), settings=settings, folder=folder, attempts=attempts,
        kills=kills or {},
    )  # fmt: skip
    quantizer = Quantizer.from_config(settings)
    done = {row["shard"]: row["ranges"] for row in _mapped(files, task)}
    for shard in range(len(files)):  # in order, so that every run folds in the same order
        quantizer.merge(Quantizer.load(done[shard]))
    return quantizer


def evaluated(model: nn.Module, files: Sequence[str]) -> float:
    """The share of all images that ``model``, float or quantized, tells right."""
    told = _mapped(files, partial(_tell, model=ray.put(model)))
    return sum(each["right"] for each in told) / sum(each["images"] for each in told)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", help="a running cluster; default: begin one here")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--observer", default="minmax", help="minmax, histogram, ...")
    parser.add_argument("--kill", action="store_true", help="kill a worker, to see it replaced")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("out/ray"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor")
    torch.set_num_threads(1)

    training, held_out = load_digits_split()
    calibration = Digits(training.images[:512], training.labels[:512])
    folder = options.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    shards = sharded(calibration, options.shards, folder)
    torch.manual_seed(0)
    model = train(ResidualCNN(), training, epochs=options.epochs)
    settings = {"qconfig": {"observer": options.observer}}

    ray.init(options.address, **({} if options.address else {"num_cpus": 2}))
    attempts = Attempts.remote()
    kills = {0: 1} if options.kill else {}
    quantizer = calibrated(model, shards, settings, folder, attempts, kills=kills)
    begun = ray.get(attempts.all.remote())
    print(f"{len(shards)} shards, begun {sum(begun.values())} times: {begun}")
    quantizer.save(folder / "ranges")

    quant_model = quantizer.quantize(model, example_inputs=(held_out.images[:BATCH],))
    (folder / "held_out").mkdir(exist_ok=True)
    parts = sharded(held_out, options.shards, folder / "held_out")
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
    print(f"{options.output / 'ranges'}: Quantizer.load takes the ranges of all shards")


if __name__ == "__main__":
    main()
