"""Calibration and evaluation over the shards of a Ray cluster, some of whose workers are killed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_quant import Quantizer

ROOT = Path(__file__).parents[1]
REASON = "three processes that import PyTorch and a cluster"


def _statistics(quantizer: Quantizer) -> dict[tuple[str, str, str], Tensor]:
    return {
        (key, what, name): x
        for key, kept in quantizer.state.state_dict()["statistics"].items()
        for what, values in kept.items()
        for name, x in values.items()
        if isinstance(x, Tensor)
    }


def _whole(model: torch.nn.Module, images: Tensor, batch: int, settings: Any) -> Quantizer:
    quantizer = Quantizer.from_config(settings)
    proxy = quantizer.calib(model)
    with torch.no_grad():
        for each in images.split(batch):
            proxy(each)
    return quantizer


def _cluster() -> None:
    """What the test's own process does: print a JSON line of what was found."""
    import ray
    import ray.exceptions
    import ray_calibration as example
    from digits_cnn_ptq import ResidualCNN
    from digits_data import Digits, load_digits_split

    torch.set_num_threads(1)
    training, held_out = load_digits_split()
    data = Digits(training.images[:160], training.labels[:160])
    torch.manual_seed(0)
    model = ResidualCNN(width=8).eval()
    folder = Path(sys.argv[1])
    shards = example.sharded(data, 3, folder)
    found: dict[str, Any] = {"rows": [len(np.load(each)["labels"]) for each in shards]}
    ray.init(num_cpus=2, include_dashboard=False)

    for observer in ("minmax", "histogram"):
        settings = {"backend": "reference", "qconfig": {"observer": observer}}
        attempts = example.Attempts.remote()
        kills = {1: 1} if observer == "minmax" else {}
        quantizer = example.calibrated(model, shards, settings, folder, attempts, kills=kills)
        begun = ray.get(attempts.all.remote())
        whole = _whole(model, data.images, example.BATCH, settings)
        ours, theirs = _statistics(quantizer), _statistics(whole)
        assert ours.keys() == theirs.keys()
        x = held_out.images[:5]
        int8, expected = (q.quantize(model, example_inputs=(x,)) for q in (quantizer, whole))
        found[observer] = {
            "begun": [begun[i] for i in range(3)],
            "different": [key for key in theirs if not torch.equal(ours[key], theirs[key])],
            "tensors": len(theirs),
            "batches": [quantizer.state.batches, whole.state.batches],
            "outputs equal": torch.equal(int8(x), expected(x)),
        }
    with torch.no_grad():
        right = [(each(held_out.images).argmax(1) == held_out.labels) for each in (model, int8)]
    (folder / "held_out").mkdir()
    parts = example.sharded(held_out, 3, folder / "held_out")
    found["right"] = [float(each.double().mean()) for each in right]
    found["right over shards"] = [example.evaluated(each, parts) for each in (model, int8)]
    attempts = example.Attempts.remote()
    try:
        kills = {2: example.ATTEMPTS + 1}
        example.calibrated(model, shards, settings, folder, attempts, kills=kills)
    except ray.exceptions.RayError as error:
        found["lost"] = str(error)[-2000:]
    found["begun when lost"] = ray.get(attempts.all.remote())[2]
    attempts = example.Attempts.remote()
    (folder / "wrong").mkdir()
    flat = Digits(data.images[:, :, 0], data.labels)
    wrong = example.sharded(flat, 1, folder / "wrong")
    try:  # what a task raises is no reason to run it again
        example.calibrated(model, wrong, settings, folder, attempts)
    except ray.exceptions.RayTaskError as error:
        found["raised"] = str(error)
    found["begun when raised"] = ray.get(attempts.all.remote())[0]
    print(json.dumps(found))


@pytest.mark.long(REASON)
@pytest.mark.timeout(0)
def test_shards_have_the_ranges_of_one_process_though_workers_are_killed(tmp_path: Path) -> None:
    for module, extra in (("ray", "ray"), ("sklearn", "examples")):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[{extra}]'")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "examples"))),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rows"] == [64, 64, 32]
    for observer, begun in (("minmax", [1, 2, 1]), ("histogram", [1, 1, 1])):
        each = found[observer]
        assert each["begun"] == begun, observer
        assert each["different"] == [], observer
        assert each["tensors"] > 20, observer
        assert each["batches"] == [5, 5], observer
        assert each["outputs equal"], observer
    assert found["right over shards"] == found["right"]
    assert "the worker of shard 2 died 4 times" in found["lost"]
    assert found["begun when lost"] == 5
    assert "the float model itself fails on these inputs (x: (32, 1, 8) float32)" in found["raised"]
    assert found["begun when raised"] == 1


if __name__ == "__main__":
    _cluster()
