"""Proxies that several threads call at once, from the first call on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import normal, seeded
from torch import nn

from torch_quant import Quantizer, UnsupportedOp, recipes


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def at_once(*jobs: Callable[[], None]) -> None:
    """Run them in threads that start together; raises what any of them raised."""
    errors: list[BaseException] = []
    gate = threading.Barrier(len(jobs))

    def run(job: Callable[[], None]) -> None:
        try:
            gate.wait()
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_may_capture_at_once() -> None:
    models = [seeded(mlp, seed=i) for i in range(4)]
    quantizers = [Quantizer("reference") for _ in models]

    def job(i: int) -> Callable[[], None]:
        def calibrate() -> None:
            calib_model = quantizers[i].calib(models[i])
            for batch in (1, 3):
                x = normal(batch, 16)
                assert torch.equal(calib_model(x), models[i](x))
            quantizers[i].quantize(models[i])

        return calibrate

    at_once(*(job(i) for i in range(4)))
    assert all(len(quantizer.plan.quantized) == 2 for quantizer in quantizers)


def test_threads_may_share_a_calib_proxy() -> None:
    model, batches = seeded(mlp), [normal(batch, 16, salt=batch) for batch in range(1, 9)]
    # Means, which the default records too, depend in their last bits on the order of calls.
    quantizer, alone = (Quantizer(recipes.fast(), backend="reference") for _ in range(2))
    calib_model, one_by_one = quantizer.calib(model), alone.calib(model)

    def calibrate(mine: list[torch.Tensor]) -> Callable[[], None]:
        def job() -> None:
            for x in mine:
                assert torch.equal(calib_model(x), model(x))

        return job

    at_once(*(calibrate(batches[i::4]) for i in range(4)))
    for x in batches:
        one_by_one(x)
    assert quantizer.state.batches == len(batches)
    x = normal(5, 16)
    assert torch.equal(quantizer.quantize(model)(x), alone.quantize(model)(x))


class Stops(nn.Module):
    """In pieces; may be stopped between its layers, in the middle of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)
        self.arrived, self.resume = threading.Event(), threading.Event()
        self.resume.set()
        self.fails = threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if y.detach().sum() > 1e9:
            return y
        self.arrived.set()
        assert self.resume.wait(60)
        if self.fails.is_set():
            raise ArithmeticError
        return self.second(y)


def test_quantizing_while_another_thread_calibrates_waits_for_its_batch() -> None:
    model, quantizer = seeded(Stops).eval(), Quantizer("reference")
    calib_model = quantizer.calib(model)
    calib_model(normal(4, 16))
    found: list[str] = []

    def asks() -> None:
        found.append(str(quantizer.state_dict()))
        quantizer.coverage(model)
        quantizer.quantize(model)
        found.append(quantizer.plan.summary)

    in_the_middle_of_a_batch(model, calib_model, asks)
    assert quantizer.state.batches == 2
    assert found == [str(quantizer.state_dict()), quantizer.plan.summary]


def test_merging_and_training_wait_for_the_batch_of_another_thread() -> None:
    """Else the batch, which fails, takes away what was merged, or its half is trained on."""

    def started() -> tuple[Stops, Quantizer, Any]:
        model, quantizer = seeded(Stops).eval(), Quantizer("reference", qconfig=recipes.fast())
        calib_model = quantizer.calib(model)
        calib_model(normal(4, 16))
        return model, quantizer, calib_model

    _, other, calib_other = started()
    calib_other(100 * normal(4, 16))
    model, quantizer, calib_model = started()
    model.fails.set()
    in_the_middle_of_a_batch(model, calib_model, lambda: quantizer.merge(other))
    ranges = {
        key: (found["range"].min_val, found["range"].max_val)  # type: ignore[attr-defined]
        for key, found in other.state.statistics.items()
    }
    merged = quantizer.state.statistics
    assert quantizer.state.batches == 3
    assert {
        key: (found["range"].min_val, found["range"].max_val)  # type: ignore[attr-defined]
        for key, found in merged.items()
    } == ranges

    model, quantizer, calib_model = started()
    model.fails.set()
    made: list[Any] = []
    in_the_middle_of_a_batch(model, calib_model, lambda: made.append(quantizer.qat(model)))
    model.fails.clear()
    again = quantizer.qat(model)
    assert float(made[0].first.input_scale) == float(again.first.input_scale)


def in_the_middle_of_a_batch(model: Stops, calib_model: Any, job: Any) -> None:
    """Call ``job`` from another thread while ``model`` stands in a batch, ten times larger."""
    model.arrived.clear()
    model.resume.clear()

    def calibrates() -> None:
        with contextlib.suppress(ArithmeticError):
            calib_model(10 * normal(4, 16, salt=1))

    jobs = [threading.Thread(target=calibrates), threading.Thread(target=job)]
    jobs[0].start()
    assert model.arrived.wait(60)
    jobs[1].start()
    jobs[1].join(1)  # long enough to read half a batch, if it did
    model.resume.set()
    for each in jobs:
        each.join()


def test_only_a_model_without_products_is_called_empty() -> None:
    empty = nn.Sequential(nn.ReLU(), nn.Flatten())
    quantizer = Quantizer("reference")
    quantizer.calib(empty)(normal(2, 4))
    with pytest.raises(UnsupportedOp, match="it has no product of float tensors"):
        quantizer.quantize(empty)

    class Undecided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight if x.sum() > 0 else x

    model = Undecided()
    quantizer = Quantizer("reference")
    quantizer.calib(model)(normal(2, 4))
    with pytest.raises(UnsupportedOp, match=r"runs as Python: .*data-dependent") as raised:
        quantizer.quantize(model)
    assert "no product" not in str(raised.value)
