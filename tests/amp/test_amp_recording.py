"""What an AMP proxy records: of the model as it is now, whole batches only, and times."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from amp_proxies import assert_same, facts, fresh, ready
from flows import CASES, assert_unchanged, calibrated, run, snapshot
from models import MODELS, example, normal, seeded
from torch import Tensor, nn

from torch_quant import NotCalibrated, QuantError


def test_max_batches() -> None:
    model = MODELS["mlp"]()
    quantizer = ready(model, *example("mlp", 16))
    amp_model = quantizer.amp(model, max_batches=2)
    for batch in (2, 3, 4):
        assert_same(amp_model(*example("mlp", batch)), model(*example("mlp", batch)))
    assert amp_model.recorder.batches == 2
    assert amp_model.recorder.gram.draws == 5
    assert quantizer.sensitivity(amp_model).batches == 2


def test_a_seed_gives_the_same_scores_and_another_one_others() -> None:
    model, x = MODELS["mlp"](), example("mlp", 8)
    quantizer = ready(model, *example("mlp", 16))
    first, again, other = (
        fresh(quantizer, model, *x, seed=seed).recorder.gram.matrix for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_ranges_of_calibration_are_not_touched() -> None:
    model = MODELS["mlp"]()
    quantizer = ready(model, *example("mlp", 16))
    x = example("mlp", 4)
    expected = quantizer.quantize(model)(*x)
    fresh(quantizer, model, 50.0 * x[0])
    assert quantizer.state.batches == 1
    assert torch.equal(quantizer.quantize(model)(*x), expected)


# ---- a batch counts whole or not at all


def bad_input(x: Tensor) -> Tensor:
    x[0, 0] = math.nan
    return x


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (bad_input, QuantError, r"batch 1: the sensitivity of \w+ is not finite.*NaN"),
        (lambda x: x[:0], QuantError, "batch 1 is empty"),
        (lambda x: x[:, :5], Exception, None),
        (lambda x: "x", Exception, None),
    ],
    ids=["nan", "empty", "shape", "no tensor"],
)
def test_a_batch_that_raises_records_nothing(
    spoil: Callable[[Tensor], Any], error: type[Exception], message: str | None
) -> None:
    model = MODELS["mlp"]()
    quantizer = ready(model, *example("mlp", 16))
    amp_model = fresh(quantizer, model, *example("mlp", 8))
    before, model_before = facts(amp_model), snapshot(model)
    with pytest.raises(error, match=message):
        amp_model(spoil(*example("mlp", 4)))
    assert facts(amp_model) == before
    assert_unchanged(model, model_before)
    assert_same(amp_model(*example("mlp", 4)), model(*example("mlp", 4)))
    assert amp_model.recorder.batches == 2


def test_nan_names_the_site_where_it_comes_from() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clean, self.bad = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.clean(x), self.bad(y)

    model = seeded(Two)
    quantizer = calibrated(model, [((normal(8, 16), normal(8, 16)), {})], backend="reference")
    amp_model = quantizer.amp(model)
    with pytest.raises(QuantError, match="the sensitivity of bad is not finite"):
        amp_model(normal(4, 16), bad_input(normal(4, 16)))


def test_memory_does_not_grow_with_the_data() -> None:
    model = MODELS["small_cnn"]()
    quantizer = ready(model, *example("small_cnn", 16))
    amp_model = quantizer.amp(model)

    def alive(calls: int) -> int:
        for _ in range(calls):
            amp_model(*example("small_cnn", 16))
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    first = alive(3)  # more than the rows that are kept
    assert alive(9) == first
    assert sum(len(args[0]) for args, _, _ in amp_model.samples) == 32


def test_the_samples_are_copies() -> None:
    model = MODELS["mlp"]()
    quantizer = ready(model, *example("mlp", 16))
    x = example("mlp", 4)[0]
    amp_model = quantizer.amp(model)
    outputs = amp_model(x)
    outputs.zero_()
    x.zero_()
    ((args, kwargs, kept),) = amp_model.samples
    assert torch.equal(args[0], example("mlp", 4)[0])
    assert torch.equal(kept, model(args[0]))
    assert kwargs == {}


def test_where_calibration_never_went() -> None:
    """A branch without ranges is refused, and leaves the model as quantizable as it was."""
    case = CASES["branch_switches"]
    model = case.build()
    quantizer = calibrated(model, case.ones())
    expected = run(quantizer.quantize(model), case.inputs(1))
    with pytest.raises(NotCalibrated, match="no calibration data passed"):
        run(quantizer.amp(model), case.inputs(3))
    assert torch.equal(run(quantizer.quantize(model), case.inputs(1)), expected)


# ---- time


def test_latency_of_every_site() -> None:
    model, x = MODELS["small_cnn"](), example("small_cnn", 4)
    quantizer = ready(model, *x)
    amp_model = fresh(quantizer, model, *x)
    before = facts(amp_model)
    times = amp_model.measure_latency(repeats=3)
    assert set(times) == set(quantizer.sensitivity(amp_model).names)
    assert all(each.float32 > 0.0 and each.quantized > 0.0 for each in times.values())
    assert facts(amp_model) == before
    assert_same(amp_model(*x), model(*x))
