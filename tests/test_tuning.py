"""Accuracy-driven tuning: of trained networks that int8 hurts, and of metrics made up for it."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from flows import assert_unchanged, calibrated, snapshot
from models import normal, seeded
from torch import Tensor, nn

from benchmarks.networks import DepthwiseCNN, SmallViT
from torch_quant import InvalidConfig, NotCalibrated, QConfig, Quantizer, QuantSpec, sqnr, tune
from torch_quant.backends import available_backends
from torch_quant.proxies import AmpModel

if TYPE_CHECKING:
    from examples.digits_data import Digits

BACKENDS = [backend.name for backend in available_backends()]

# ---- honest models, trained for a second or two


def activations(bits: int) -> QConfig:
    return QConfig(input=QuantSpec.of(bits=bits))


def weights(bits: int) -> QConfig:
    spec = QuantSpec.of(bits=bits, signed=True, symmetric=True, per_channel=True)
    return QConfig(weight=spec)


def perceptron() -> nn.Module:
    sizes = (64, 64, 64, 64)
    hidden = [m for size in sizes for m in (nn.Linear(64, size), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))


def outliers(model: SmallViT) -> None:
    """Two channels a thousand times as large as the others, which computes the very same."""
    readers = [layer for pair in zip(model.qkv, model.up, strict=True) for layer in pair]
    for norm, reader in zip(model.norms, readers, strict=True):
        for channel in (3, 11):
            norm.weight[channel] *= 1000.0
            norm.bias[channel] *= 1000.0
            reader.weight[:, channel] /= 1000.0


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's: pip install scikit-learn")
    from examples.digits_data import load_digits_split

    return load_digits_split()


BUILD: dict[str, Callable[[], nn.Module]] = {
    "depthwise": lambda: DepthwiseCNN(12, 2),
    "outliers": lambda: SmallViT(32, 2, 4),
    "perceptron": perceptron,
}
TRAIN = """
import sys, torch
from examples.digits_data import load_digits_split, train
from test_tuning import BUILD, EPOCHS
torch.manual_seed(0)
model = train(BUILD[sys.argv[1]](), load_digits_split()[0], epochs=EPOCHS[sys.argv[1]])
torch.save(model.state_dict(), sys.argv[2])
"""
EPOCHS = {"depthwise": 5, "outliers": 8, "perceptron": 8}


def network(kind: str, folder: Path) -> nn.Module:
    """Trained in a process of its own: IPEX, once loaded, takes away gradients of layer norms."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join(str(each) for each in (root, root / "tests", root / "examples"))
    environment = os.environ | {"PYTHONPATH": path, "TQDM_DISABLE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", TRAIN, kind, str(folder / "state.pt")]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    model = BUILD[kind]()
    model.load_state_dict(torch.load(folder / "state.pt"))
    return model.eval()


def trained(kind: str, data: Digits, folder: Path) -> tuple[nn.Module, dict[Any, QConfig | None]]:
    """A network, and the formats that it does not bear."""
    model = network(kind, folder)
    overrides: dict[str, dict[Any, QConfig | None]] = {
        "depthwise": {
            "blocks.0.3": activations(2),
            "blocks.1.3": activations(3),
            "blocks.1.0": activations(4),
        },
        "outliers": {},
        "perceptron": {"3": weights(2), "5": weights(2)},
    }
    if isinstance(model, SmallViT):
        before = model(data.images[:64])
        outliers(model)
        assert sqnr(before, model(data.images[:64])) > 80.0
    return model, overrides[kind]


@pytest.mark.parametrize("kind", ["depthwise", "outliers", "perceptron"])
def test_a_network_that_int8_hurts_is_within_its_tolerance(
    kind: str, digits: tuple[Digits, Digits], tmp_path: Path
) -> None:
    training, held_out = digits
    model, overrides = trained(kind, training, tmp_path)
    quantizer = Quantizer("reference", overrides=overrides)
    calib_model = quantizer.calib(model)
    for images in training.images[:256].split(64):
        calib_model(images)
    evaluated: list[float] = []

    def accuracy(candidate: nn.Module) -> float:
        right = sum(
            int((candidate(images).argmax(1) == labels).sum())
            for images, labels in zip(
                held_out.images.split(100), held_out.labels.split(100), strict=True
            )
        )
        evaluated.append(right / len(held_out.labels))
        return evaluated[-1]

    exact = accuracy(model)
    assert exact > 0.6  # it has learned something
    in_int8 = accuracy(quantizer.quantize(model))
    assert in_int8 < 0.99 * exact, "or there is nothing to tune"
    layers = len(quantizer.plan.quantized)
    evaluated.clear()
    before = snapshot(model)

    quant_model = tune(quantizer, model, accuracy, tolerance=0.01, progress=False)
    assert_unchanged(model, before)
    assert len(evaluated) <= 2 + math.ceil(math.log2(layers))
    report = quantizer.tuning
    assert report is not None
    assert report.reached
    assert report.stopped == ""
    assert report.target == pytest.approx(0.99 * exact)
    assert [trial.metric for trial in report.trials] == evaluated
    assert [trial.in_float for trial in report.trials[:2]] == [None, 0]
    assert evaluated[:2] == [exact, in_int8]
    assert 0 < len(report.names) < layers
    assert report.best.in_float == len(report.names)  # no groups of several sites here
    assert accuracy(quant_model) == report.best.metric >= report.target
    text = str(report)
    for trial in report.trials:
        assert f"{trial.metric:.6g}" in text
    assert len([line for line in text.splitlines() if line[:1].isdigit()]) == len(report.trials)
    assert f"reached with {report.best.in_float} of {layers} layers in float" in text
    assert all(name in text for name in report.names)

    # The quantizer is left in that state.
    assert tuple(quantizer.fallen_back) == report.names
    assert {n for n, site in quantizer.plan.items() if not site.quantized} == set(report.names)
    x = held_out.images[:7]
    assert torch.equal(quantizer.quantize(model)(x), quant_model(x))
    other = Quantizer("reference", overrides=overrides)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.quantize(model, example_inputs=x)(x), quant_model(x))


# ---- made-up metrics, to steer the search

LAYERS = 6


def ready(backend: str = "reference") -> tuple[nn.Module, Quantizer]:
    model = seeded(lambda: nn.Sequential(*(nn.Linear(16, 16) for _ in range(LAYERS))))
    return model, calibrated(model, [((normal(16, 16),), {})], backend=backend)


class Metric:
    """Calls the model, then gives what ``value`` says of how many layers are in float.

    The float model is None to it.
    """

    def __init__(self, quantizer: Quantizer, value: Callable[[int | None], Any]) -> None:
        self.quantizer, self.value = quantizer, value
        self.asked: list[int | None] = []

    def __call__(self, model: nn.Module) -> Any:
        model(normal(4, 16))
        count = None if isinstance(model, AmpModel) else len(self.quantizer.fallen_back)
        self.asked.append(count)
        return self.value(count)


def needing(needed: int) -> Callable[[int | None], float]:
    """1 with so many layers in float, less with fewer."""
    return lambda count: 1.0 if count is None or count >= needed else 0.5 + 0.01 * count


@pytest.mark.parametrize("needed", range(LAYERS))
def test_the_fewest_layers_that_will_do(needed: int) -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, needing(needed))
    quant_model = tune(quantizer, model, metric, progress=False)
    assert len(quantizer.fallen_back) == needed
    assert len(metric.asked) <= 2 + math.ceil(math.log2(LAYERS))
    assert len(set(metric.asked)) == len(metric.asked)
    report = quantizer.tuning
    assert report is not None
    assert report.reached
    assert report.best.in_float == needed
    amp_model = quantizer.amp(model)
    amp_model(normal(4, 16))
    worst = quantizer.sensitivity(amp_model).names[:needed]
    assert list(quantizer.fallen_back) == worst
    assert torch.equal(quantizer.quantize(model)(normal(3, 16)), quant_model(normal(3, 16)))


def test_a_target_out_of_reach(caplog: pytest.LogCaptureFixture) -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, lambda count: 1.0 if count is None else 0.5 + 0.01 * count)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        quant_model = tune(quantizer, model, metric, progress=False)
    report = quantizer.tuning
    assert report is not None
    assert not report.reached
    assert "tuning did not reach its target" in caplog.text
    assert "NOT reached" in str(report)
    best = max(count for count in metric.asked if count is not None)
    assert report.best.in_float == len(quantizer.fallen_back) == best
    assert torch.equal(quantizer.quantize(model)(normal(3, 16)), quant_model(normal(3, 16)))


@pytest.mark.parametrize(
    ("options", "trials", "reason"),
    [
        ({"max_trials": 2}, 2, "max_trials=2"),
        ({"max_trials": 3}, 3, "max_trials=3"),
        ({"timeout": 0.0}, 2, "timeout=0 s"),
        ({"timeout": 1e6, "max_trials": 99}, 5, ""),
    ],
    ids=["2 trials", "3 trials", "no time", "enough"],
)
def test_a_search_that_is_cut_short(options: dict[str, Any], trials: int, reason: str) -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, needing(2))
    tune(quantizer, model, metric, progress=False, **options)
    report = quantizer.tuning
    assert report is not None
    assert len(metric.asked) == len(report.trials) == trials
    assert report.stopped == reason
    assert (f"stopped early: {reason}" in str(report)) == bool(reason)
    # What was tried and passed is kept, be it not the fewest.
    passed = [t.in_float for t in report.quantized if t.passed]
    assert len(quantizer.fallen_back) == (min(passed) if passed else 0)


def test_lower_is_better() -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, lambda count: 2.0 if count is None or count >= 3 else 3.0)
    tune(quantizer, model, metric, 0.1, higher_is_better=False, progress=False)
    assert len(quantizer.fallen_back) == 3
    assert quantizer.tuning is not None
    assert quantizer.tuning.target == pytest.approx(2.2)
    assert "metric <= 2.2" in str(quantizer.tuning)


def test_lower_is_better_and_out_of_reach() -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, lambda count: 1.0 if count is None else 9.0 - count)
    tune(quantizer, model, metric, higher_is_better=False, progress=False)
    assert len(quantizer.fallen_back) == max(c for c in metric.asked if c is not None)
    assert quantizer.tuning is not None
    assert not quantizer.tuning.reached


@pytest.mark.parametrize(
    ("exact", "tolerance", "relative", "higher", "target"),
    [
        (0.8, 0.01, True, True, 0.792),
        (0.8, 0.01, False, True, 0.79),
        (-10.0, 0.1, True, True, -11.0),
        (-10.0, 0.1, True, False, -9.0),
        (4.0, 0.5, False, False, 4.5),
        (0.8, 0.0, True, True, 0.8),
    ],
)
def test_the_target(
    exact: float, tolerance: float, relative: bool, higher: bool, target: float
) -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, lambda count: exact)
    tune(quantizer, model, metric, tolerance, relative, higher_is_better=higher, progress=False)
    assert quantizer.tuning is not None
    assert quantizer.tuning.target == pytest.approx(target)
    assert quantizer.fallen_back == {}
    assert metric.asked == [None, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_fallback_in_bfloat16(backend: str) -> None:
    model, quantizer = ready(backend)
    metric = Metric(quantizer, needing(2))
    tune(quantizer, model, metric, dtype=torch.bfloat16, progress=False)
    assert list(quantizer.fallen_back.values()) == ["bfloat16"] * 2


@pytest.mark.parametrize("needed", [1, 3], ids=["enough already", "more is needed"])
def test_what_fell_back_before_is_kept(needed: int) -> None:
    model, quantizer = ready()
    amp_model = quantizer.amp(model)
    amp_model(normal(4, 16))
    best = quantizer.sensitivity(amp_model).names[-1]
    quantizer.load_state_dict(quantizer.state_dict() | {"fallback": {best: "bfloat16"}})
    metric = Metric(quantizer, needing(needed))
    tune(quantizer, model, metric, progress=False)
    assert len(quantizer.fallen_back) == needed
    assert quantizer.fallen_back[best] == "bfloat16"
    assert quantizer.tuning is not None
    assert quantizer.tuning.names == tuple(quantizer.fallen_back)
    assert metric.asked[:2] == [None, 1]


def test_everything_fell_back_before() -> None:
    model, quantizer = ready()
    fallen = {str(i): "float32" for i in range(LAYERS)}
    quantizer.load_state_dict(quantizer.state_dict() | {"fallback": fallen})
    metric = Metric(quantizer, needing(0))
    quant_model = tune(quantizer, model, metric, progress=False)
    assert quantizer.fallen_back == fallen
    assert metric.asked == [None, LAYERS]
    torch.testing.assert_close(quant_model(normal(3, 16)), model(normal(3, 16)))


def test_a_metric_may_be_a_tensor_and_may_hide_its_gradients() -> None:
    model, quantizer = ready()
    x = normal(8, 16)
    expected = model(x)

    def error(candidate: nn.Module) -> Tensor:
        with torch.inference_mode():
            return (candidate(x) - expected).square().mean()

    tune(quantizer, model, error, 1.0, relative=False, higher_is_better=False, progress=False)
    assert quantizer.tuning is not None
    assert quantizer.tuning.trials[0].metric == 0.0
    assert quantizer.tuning.reached


def test_it_ranks_on_the_first_batches_only() -> None:
    model, quantizer = ready()
    seen: list[AmpModel] = []

    def metric(candidate: nn.Module) -> float:
        for _ in range(5):
            candidate(normal(4, 16))
        if isinstance(candidate, AmpModel):
            seen.append(candidate)
        return 1.0

    tune(quantizer, model, metric, amp_batches=2, progress=False)
    (amp_model,) = seen
    assert amp_model.recorder.batches == 2


def test_it_is_silent_if_asked_to(capfd: pytest.CaptureFixture[str]) -> None:
    model, quantizer = ready()
    tune(quantizer, model, Metric(quantizer, needing(1)), progress=False)
    assert capfd.readouterr() == ("", "")


# ---- what goes wrong leaves the quantizer as it was


def state_of(quantizer: Quantizer) -> Any:
    return dict(quantizer.fallen_back), dict(quantizer.plan), quantizer.tuning


class Broken(Exception):
    pass


def raising(at: int) -> Callable[[int | None], float]:
    calls = [0]

    def value(count: int | None) -> float:
        calls[0] += 1
        if calls[0] == at:
            raise Broken
        return needing(3)(count)

    return value


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_eval_fn_that_raises(at: int) -> None:
    model, quantizer = ready()
    amp_model = quantizer.amp(model)
    amp_model(normal(4, 16))
    quantizer.fallback(amp_model, 1)
    x = normal(3, 16)
    expected = quantizer.quantize(model)(x)
    before = state_of(quantizer)
    with pytest.raises(Broken):
        tune(quantizer, model, Metric(quantizer, raising(at)), progress=False)
    assert state_of(quantizer) == before
    assert torch.equal(quantizer.quantize(model)(x), expected)


@pytest.mark.parametrize("value", [None, "0.9", [], "high"], ids=repr)
@pytest.mark.parametrize("when", ["float", "quantized"])
def test_a_metric_that_is_no_number(value: Any, when: str) -> None:
    model, quantizer = ready()
    before = state_of(quantizer)
    metric = Metric(quantizer, lambda c: value if (c is None) == (when == "float") else 1.0)
    if value == "0.9":
        tune(quantizer, model, metric, progress=False)  # a number, as Python reads it
        return
    with pytest.raises(InvalidConfig, match=r"eval_fn gave .* for .*; expected a number"):
        tune(quantizer, model, metric, progress=False)
    assert state_of(quantizer) == before


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_float_model_without_a_finite_metric(value: float) -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, lambda count: value)
    with pytest.raises(InvalidConfig, match=f"eval_fn gave {value} for the float model"):
        tune(quantizer, model, metric, progress=False)
    assert metric.asked == [None]


def test_a_quantized_model_that_gives_nan_did_not_pass() -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, lambda c: 1.0 if c is None or c >= 2 else math.nan)
    tune(quantizer, model, metric, progress=False)
    assert len(quantizer.fallen_back) == 2
    model, quantizer = ready()
    metric = Metric(quantizer, lambda c: 1.0 if c is None else math.nan if c != 3 else 0.5)
    tune(quantizer, model, metric, progress=False)
    assert quantizer.tuning is not None
    assert not quantizer.tuning.reached
    assert quantizer.tuning.best.metric == 0.5


def test_an_eval_fn_that_never_calls_the_model() -> None:
    model, quantizer = ready()
    before = state_of(quantizer)
    with pytest.raises(NotCalibrated, match="eval_fn never called the model"):
        tune(quantizer, model, lambda candidate: 1.0, progress=False)
    assert state_of(quantizer) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.1}, r"tolerance=-0\.1; expected 0 or more"),
        ({"tolerance": math.nan}, "tolerance=nan"),
        ({"tolerance": math.inf}, "tolerance=inf"),
        ({"max_trials": 1}, "max_trials=1; expected at least 2"),
        ({"metric": "psnr"}, "unknown metric 'psnr'"),
        ({"dtype": torch.float16}, r"torch\.float16; expected torch\.float32 or"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_cost_no_evaluation(options: dict[str, Any], message: str) -> None:
    model, quantizer = ready()
    metric = Metric(quantizer, needing(0))
    with pytest.raises(InvalidConfig, match=message):
        tune(quantizer, model, metric, progress=False, **options)
    assert metric.asked == []


def test_a_quantizer_that_saw_no_data() -> None:
    model, _ = ready()
    with pytest.raises(NotCalibrated, match=r"quantizer\.calib\(model\)"):
        tune(Quantizer("reference"), model, lambda candidate: 1.0, progress=False)
    quantizer = calibrated(model, [((normal(4, 16),), {})], backend="reference")
    with pytest.raises(NotCalibrated, match="not the one that was calibrated"):
        tune(quantizer, nn.Linear(16, 16), lambda candidate: 1.0, progress=False)
