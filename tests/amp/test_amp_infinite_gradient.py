"""A sample whose gradient is infinite is left out, or the ranking is one by local noise."""

from __future__ import annotations

import logging

import pytest
import torch
from amp_proxies import assert_same, facts, fresh, ready
from flows import assert_unchanged, snapshot
from models import normal, seeded
from torch import Tensor, nn

from torch_quant import QuantError, Quantizer, sqnr, tune


class Spectrum(nn.Module):
    """The amplitude of silence is 0, where a square root has no finite gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.re, self.im = nn.Linear(16, 12, bias=False), nn.Linear(16, 12, bias=False)
        self.hidden, self.head = nn.Linear(12, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        power = self.re(x).square() + self.im(x).square()
        return self.head(self.hidden(power.sqrt()).relu())


def sounds(count: int = 16, *silent: int) -> Tensor:
    x = normal(count, 16)
    x[list(silent)] = 0.0
    return x


def prepared() -> tuple[nn.Module, Quantizer]:
    model = seeded(Spectrum)
    return model, ready(model, normal(32, 16))


@pytest.mark.parametrize("silent", [(0,), (5,), (2, 15)])
def test_a_sample_with_an_infinite_gradient_is_left_out(
    silent: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    model, quantizer = prepared()
    x, before = sounds(16, *silent), snapshot(model)
    amp_model = quantizer.amp(model)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        for _ in range(2):
            assert_same(amp_model(x), model(x).detach())
    assert_unchanged(model, before)
    count = len(silent)
    left = f"samples of batch 0 left out of the scores: {count} of 16, the gradient of sqrt is not"
    assert caplog.text.count("left out") == caplog.text.count(left) == 1
    assert amp_model.recorder.gram.draws == 2 * (16 - count)
    ranking = quantizer.sensitivity(amp_model)
    assert ranking.metric == amp_model.metric == "output"
    assert ranking.note == (
        f"samples left out of the scores: {2 * count}, the gradient of sqrt is not finite for them"
    )
    assert ranking.note in str(ranking)


@pytest.mark.parametrize("loss", [False, True], ids=["outputs", "loss"])
def test_the_scores_are_those_of_the_other_samples(loss: bool) -> None:
    """The random signs are the same for both, as the silent samples are the last ones."""
    model, quantizer = prepared()
    loss_fn = (lambda outputs, batch: outputs.square().sum()) if loss else None
    x = sounds(16, 14, 15)
    found, expected = (
        quantizer.sensitivity(fresh(quantizer, model, each, loss_fn=loss_fn))
        for each in (x, x[:14])
    )
    assert found.names == expected.names
    for site in expected:
        # sums in another order; float32 products of 14 or 16 rows
        assert found.of(site.name).score == pytest.approx(site.score, rel=1e-4)
        assert found.of(site.name).gain == pytest.approx(site.gain, rel=1e-3)
        assert found.of(site.name).weight_share == pytest.approx(site.weight_share, rel=1e-4)
    assert found.predicted() == pytest.approx(expected.predicted(), abs=1e-3, nan_ok=True)


def test_shares_are_of_the_samples_that_count() -> None:
    """Of 16 samples, the first two tell them: here the second one alone."""
    model, quantizer = prepared()
    ranking = quantizer.sensitivity(fresh(quantizer, model, sounds(16, 0)))
    for site in ranking:
        assert 0.0 < site.weight_share < 1.0


def test_without_any_gradient_local_noise_ranks(caplog: pytest.LogCaptureFixture) -> None:
    model, quantizer = prepared()
    x = normal(4, 16)
    x[:, :] = 0.0
    amp_model = quantizer.amp(model)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        for _ in range(2):
            assert_same(amp_model(x), model(x).detach())
    assert caplog.text.count("4 of 4, the gradient of sqrt is not finite") == 1
    ranking = quantizer.sensitivity(amp_model)
    expected = quantizer.sensitivity(fresh(quantizer, model, x, metric="sqnr"))
    assert ranking.metric == amp_model.metric == "sqnr"
    assert ranking.note == (
        'ranked by "sqnr": the gradient of sqrt is not finite for any sample that was seen'
    )
    assert ranking.names == expected.names
    for site in expected:
        assert ranking.of(site.name).score == pytest.approx(site.score)
        assert ranking.of(site.name).weight_share == pytest.approx(site.weight_share)
    assert quantizer.fallback(amp_model, 1) == ranking.names[:1]


class Mixed(Spectrum):
    """One number for the whole batch, in which no sample can be told from the others."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y, y.mean()


def test_samples_that_cannot_be_told_apart_are_left_out_together() -> None:
    model = seeded(Mixed)
    quantizer = ready(model, normal(32, 16))
    x = sounds(16, 3)
    amp_model = quantizer.amp(model)
    assert_same(amp_model(x), tuple(y.detach() for y in model(x)))
    ranking = quantizer.sensitivity(amp_model)
    assert ranking.metric == "sqnr"
    assert all(0.0 < site.weight_share < 1.0 for site in ranking)
    assert all(site.score > 0.0 for site in ranking)


@pytest.mark.parametrize("order", ["bad first", "good first"])
def test_batches_in_turn(order: str) -> None:
    model, quantizer = prepared()
    good, bad = normal(16, 16), torch.zeros(4, 16)
    amp_model = quantizer.amp(model)
    for x in (bad, good) if order == "bad first" else (good, bad):
        assert_same(amp_model(x), model(x).detach())
    found = quantizer.sensitivity(amp_model)
    assert found.metric == "output"
    assert found.batches == 2
    assert found.note.startswith("samples left out of the scores: 4, the gradient of sqrt")
    signs = quantizer.amp(model)
    if order == "bad first":  # the random signs of the good batch are the second ones
        signs(bad)
    signs(good)
    expected = quantizer.sensitivity(signs)
    for site in expected:
        assert found.of(site.name).score == pytest.approx(site.score)
        assert found.of(site.name).weight_share == pytest.approx(site.weight_share)
    assert found.predicted() == pytest.approx(expected.predicted())


def test_shares_of_local_noise_do_not_mix_with_those_at_the_outputs() -> None:
    model, quantizer = prepared()
    good, bad = normal(16, 16), torch.zeros(4, 16)
    amp_model = quantizer.amp(model, seed=3)
    amp_model(bad)
    amp_model(good)
    alone = quantizer.amp(model, seed=3)
    alone(normal(4, 16))  # as many random signs
    first = {name: vars(stats).copy() for name, stats in alone.recorder.sites.items()}
    alone(good)
    for name, stats in alone.recorder.sites.items():
        part = stats.from_weight - first[name]["from_weight"]
        assert amp_model.recorder.sites[name].from_weight == pytest.approx(part)


def test_a_batch_that_raises_after_one_that_was_left_out_records_nothing() -> None:
    model, quantizer = prepared()
    amp_model = fresh(quantizer, model, sounds(16, 3))
    before, note = facts(amp_model), amp_model.note
    x = sounds(16, 2)
    x[5] = torch.nan
    with pytest.raises(QuantError, match=r"batch 1: the sensitivity of \w+ is not finite"):
        amp_model(x)
    assert facts(amp_model) == before
    assert amp_model.note == note


def test_changed_ranges_forget_what_was_left_out() -> None:
    model, quantizer = prepared()
    amp_model = fresh(quantizer, model, torch.zeros(4, 16))
    assert amp_model.metric == "sqnr"
    quantizer.calib(model)(3.0 * normal(16, 16))
    amp_model(normal(16, 16))
    assert amp_model.metric == "output"
    assert amp_model.note == ""


@pytest.mark.parametrize("silent", [(3,), tuple(range(16))], ids=["one", "all"])
def test_reports_fallback_and_tuning_go_on(silent: tuple[int, ...]) -> None:
    model, quantizer = prepared()
    x = sounds(16, *silent)
    amp_model = fresh(quantizer, model, x)
    report = quantizer.sensitivity(amp_model, measure=True)
    assert "gradient of sqrt" in str(report)
    names = quantizer.fallback(amp_model, 2)
    assert len(names) == 2
    assert quantizer.quantize(model)(x).isfinite().all()
    assert set(amp_model.measure_latency(repeats=1)) == set(report.names)
    quantizer.reset_fallback()
    with torch.no_grad():
        expected = model(x)

    def eval_fn(candidate: nn.Module) -> float:
        return min(sqnr(expected, candidate(x)), 60.0)

    tuned = tune(quantizer, model, eval_fn, 20.0, relative=False, progress=False)
    assert sqnr(expected, tuned(x)) >= 40.0


class Transformed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 1, 9, padding=4, bias=False), nn.Linear(33 * 17, 8)

    def forward(self, x: Tensor) -> Tensor:
        wave = self.conv(x[:, None])[:, 0]
        window = torch.hann_window(64)
        bins = torch.stft(wave, 64, 16, window=window, pad_mode="constant", return_complex=True)
        return self.head((bins.real**2 + bins.imag**2).sqrt().flatten(1))


def test_silence_in_a_short_time_spectrum() -> None:
    model = seeded(Transformed)
    x = normal(6, 256)
    x[4] = 0.0
    quantizer = ready(model, normal(6, 256))
    amp_model = quantizer.amp(model)
    assert_same(amp_model(x), model(x).detach())
    assert (amp_model.recorder.left_out, amp_model.recorder.culprit) == (1, "sqrt")
    assert quantizer.sensitivity(amp_model).metric == "output"
    assert quantizer.sensitivity(amp_model).of("conv").score > 0.0


class Shapes(nn.Module):
    def __init__(self, finish: object) -> None:
        super().__init__()
        self.l0, self.finish = nn.Linear(16, 16, bias=False), finish

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.l0(x))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("finish", "name"),
    [
        (lambda y: y.square().sum(1).sqrt().tanh(), "sqrt"),
        (lambda y: (1.0 + y.abs() ** 0.5) * 2.0, "pow"),
        (lambda y: torch.rsqrt(y.square().sum(1)).clamp(max=10.0) + 1.0, "rsqrt"),
        (lambda y: y.square().sum(1).log().exp() + 1.0, "log"),
    ],
    ids=["sqrt", "pow", "rsqrt", "log"],
)
def test_the_operator_is_named(finish: object, name: str) -> None:
    model = seeded(lambda: Shapes(finish))
    quantizer = ready(model, normal(32, 16))
    amp_model = quantizer.amp(model)
    x = sounds(8, 2)
    assert_same(amp_model(x), model(x).detach())
    assert amp_model.recorder.left_out == 1
    assert amp_model.recorder.culprit == name
