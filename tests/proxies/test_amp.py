"""The AMP proxy: the float output bit for bit, and scores that are what they say they are."""

from __future__ import annotations

import gc
import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flows import CASES, assert_unchanged, calibrated, run, snapshot
from models import MODELS, example, normal, seeded
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant import InvalidConfig, ModuleFilter, NotCalibrated, QuantError, Quantizer, sqnr
from torch_quant.backends import available_backends
from torch_quant.proxies import AmpModel

WITHOUT_GRADIENT = ["in_place", "in_place_after_read"]  # a linear's input is written to
BACKENDS = [backend.name for backend in available_backends()]
MODES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
AWKWARD = [
    "branch_on_data",  # in pieces
    "loop_on_data",  # in pieces, a region called several times
    "routed_experts",
    "borrows_from_child",
    "in_place",
    "in_place_after_read",
    "in_place_on_input",
    "multihead",
    "encoder_layers",  # its fast path, without gradients only, is another kernel
    "no_grad_part",
    "infinite_mask",
    "reused_linear",
    "nested_output",
    "none_output",
    "buffers",
]


def ready(model: nn.Module, x: Tensor, *, backend: str = "reference", **options: Any) -> Quantizer:
    return calibrated(model, [((x,), {})], backend=backend, **options)


def tensors(outputs: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


def assert_same(outputs: Any, expected: Any) -> None:
    assert type(outputs) is type(expected)
    for x, y in zip(tensors(outputs), tensors(expected), strict=True):
        assert torch.equal(x, y)
        assert not x.requires_grad
        assert x.grad_fn is None


# ---- the output is the float model's


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_output_is_the_float_output(name: str, backend: str) -> None:
    model = MODELS[name]()
    quantizer = calibrated(model, [(example(name, 16), {})], backend=backend)
    before, random = snapshot(model), torch.get_rng_state()
    for mode in MODES.values():
        amp_model = quantizer.amp(model)
        for batch in (1, 3, 8):
            with mode():
                assert_same(amp_model(*example(name, batch)), model(*example(name, batch)))
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", AWKWARD)
def test_the_output_of_awkward_models_is_the_float_output(name: str) -> None:
    case = CASES[name]
    model = case.build()
    quantizer = calibrated(model, case.ones(), backend="reference")
    before = snapshot(model)
    for mode in MODES.values():
        amp_model = quantizer.amp(model)
        for batch in (1, 3):
            with mode():
                assert_same(run(amp_model, case.inputs(batch)), run(model, case.inputs(batch)))
        metric = "sqnr" if name in WITHOUT_GRADIENT else "output"
        assert amp_model.metric == metric, amp_model.note
    assert_unchanged(model, before)
    assert all(p.grad is None for p in model.parameters())


def test_the_callers_tensors_are_written_to_as_by_the_model() -> None:
    case = CASES["in_place_on_input"]
    model = case.build()
    quantizer = calibrated(model, case.ones(), backend="reference")
    ((x,), _), ((y,), _) = case.inputs(3), case.inputs(3)
    quantizer.amp(model)(x)
    model(y)
    assert torch.equal(x, y)


def test_inputs_that_want_a_gradient_get_none() -> None:
    model = MODELS["mlp"]()
    quantizer = ready(model, *example("mlp", 16))
    (x,) = example("mlp", 4)
    x.requires_grad_(True)
    with torch.enable_grad():
        assert_same(quantizer.amp(model)(x), model(x).detach())
    assert x.grad is None
    assert x.requires_grad


def test_frozen_parameters() -> None:
    model = MODELS["small_cnn"]().requires_grad_(False)
    quantizer = ready(model, *example("small_cnn", 16))
    amp_model = quantizer.amp(model)
    x = example("small_cnn", 4)
    assert_same(amp_model(*x), model(*x))
    assert all(site.score > 0.0 for site in quantizer.sensitivity(amp_model))


def test_what_is_done_to_the_proxy_does_not_reach_the_model() -> None:
    model, x = MODELS["mlp"](), example("mlp", 4)
    amp_model = ready(model, *example("mlp", 16)).amp(model)
    amp_model(*x)
    before = snapshot(model)
    amp_model.requires_grad_(False)
    amp_model.double()
    amp_model.train()
    assert_unchanged(model, before)
    assert not amp_model.training
    assert_same(amp_model(*x), model(*x))


class Counting(nn.Module):
    """Adds up what it has seen in a buffer, which comes to depend on a site's result."""

    def __init__(self) -> None:
        super().__init__()
        self.l0, self.l1 = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("total", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.l0(x)
        self.total.mul_(0.5).add_(y.mean(0))
        return self.l1(y + self.total)


def test_a_buffer_that_the_model_writes_to() -> None:
    model, twin = seeded(Counting), seeded(Counting)
    quantizer = ready(model, normal(16, 16))
    twin(normal(16, 16))
    model.total.copy_(twin.total)  # capture may have run it more than once
    amp_model = quantizer.amp(model)
    for batch in (3, 4, 5):
        outputs = amp_model(normal(batch, 16))
        expected = twin(normal(batch, 16))
        torch.testing.assert_close(outputs, expected)
        torch.testing.assert_close(model.total, twin.total)
    assert not model.total.requires_grad
    assert amp_model.metric == "output", amp_model.note


# ---- what it follows


def fresh(quantizer: Quantizer, model: nn.Module, *inputs: Tensor, **options: Any) -> AmpModel:
    """A proxy made now, which has seen one batch."""
    amp_model = quantizer.amp(model, **options)
    amp_model(*inputs)
    return amp_model


def recalibrate(quantizer: Quantizer, model: nn.Sequential) -> None:
    quantizer.calib(model)(20.0 * example("mlp", 8)[0])


def replace_parameters(quantizer: Quantizer, model: nn.Sequential) -> None:
    state = {k: 2.0 * v for k, v in model.state_dict().items()}
    state["0.weight"][0] *= 10.0  # a scale for all of it would leave the noise in proportion
    model.load_state_dict(state, assign=True)


def change_in_place(quantizer: Quantizer, model: nn.Sequential) -> None:
    model[0].weight.mul_(2.0)
    model[2].bias.add_(1.0)


@pytest.mark.parametrize("change", [recalibrate, replace_parameters, change_in_place])
def test_changes_between_calls_are_followed(
    change: Callable[[Quantizer, nn.Sequential], None],
) -> None:
    model, x = MODELS["mlp"](), example("mlp", 8)
    quantizer = ready(model, *example("mlp", 16))
    amp_model = fresh(quantizer, model, *x)
    before = {name: stats.noise for name, stats in amp_model.recorder.sites.items()}
    change(quantizer, model)
    assert_same(amp_model(*x), model(*x))
    expected = fresh(quantizer, model, *x).recorder.sites
    for name, stats in amp_model.recorder.sites.items():
        # The difference of two sums; the noise itself is the same computation.
        assert stats.noise - before[name] == pytest.approx(expected[name].noise, rel=1e-9)
    noisiest = max(expected.values(), key=lambda stats: stats.noise).noise
    assert noisiest > 1.5 * max(before.values())


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


def facts(amp_model: AmpModel) -> Any:
    recorder = amp_model.recorder
    return (
        recorder.batches,
        recorder.output_signal,
        {name: vars(stats).copy() for name, stats in recorder.sites.items()},
        recorder.gram.draws,
        recorder.gram.matrix.tolist(),
        len(amp_model.samples),
        amp_model.metric,
    )


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


# ---- the numbers


def chain(outputs: int, depth: int = 4) -> nn.Sequential:
    """Linear layers without anything between them: what is said of them to first order is exact."""
    widths = [16] * depth + [outputs]
    return seeded(lambda: nn.Sequential(*(nn.Linear(*w) for w in itertools.pairwise(widths))))


def output_noise(model: nn.Module, quantizer: Quantizer, site: str, x: Tensor) -> Tensor:
    """What quantizing only ``site`` adds to the output, by a quantized run; float64."""
    alone = Quantizer(quantizer.backend, module_filter=ModuleFilter(include_names=site))
    alone.load_state_dict(quantizer.state_dict())
    alone.calib(model, example_inputs=x)
    quant_model = alone.quantize(model)
    assert alone.plan.quantized == (site,)
    return quant_model(x).double() - model(x).double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["output", "loss"])
def test_scores_of_a_linear_network_with_one_output_are_exact(metric: str, backend: str) -> None:
    """With one output a random sign squared is 1, so nothing is left to chance."""
    model, x = chain(1), normal(24, 16)
    quantizer = ready(model, x, backend=backend)
    loss_fn = None if metric == "output" else lambda outputs, batch: outputs.sum()
    amp_model = quantizer.amp(model, loss_fn=loss_fn)
    for part in (x[:5], x[5:16], x[16:]):
        amp_model(part)
    ranking = quantizer.sensitivity(amp_model)
    noises = {name: output_noise(model, quantizer, name, x) for name in ranking.names}
    gram = amp_model.recorder.gram
    assert gram.draws == 24
    for one, first in noises.items():
        for two, second in noises.items():
            entry = gram.matrix[gram.index[one], gram.index[two]]
            # The noise is the small difference of two float32 outputs.
            scale = float(first.norm() * second.norm())
            assert float(entry) == pytest.approx(float((first * second).sum()), abs=1e-3 * scale)
    for name, noise in noises.items():
        assert ranking.of(name).score == pytest.approx(float(noise.square().sum()), rel=2e-3)
    if metric == "output":
        for name, noise in noises.items():
            only = sqnr(model(x), model(x) + noise)
            assert ranking.of(name).predicted_output_sqnr == pytest.approx(only, abs=0.02)
    worst = max(noises, key=lambda name: float(noises[name].square().sum()))
    assert ranking[0].name == worst


def test_scores_of_a_linear_network_are_right_on_average() -> None:
    model, x = chain(10), normal(64, 16)
    quantizer = ready(model, x)
    seeds = 16
    matrices = []
    for seed in range(seeds):
        amp_model = fresh(quantizer, model, x, seed=seed)
        matrices.append(amp_model.recorder.gram.matrix)
    index = amp_model.recorder.gram.index
    mean = torch.stack(matrices).mean(0)
    noises = {name: output_noise(model, quantizer, name, x) for name in index}
    for one, first in noises.items():
        for two, second in noises.items():
            exact = float((first * second).sum())
            # One draw of p_i p_j for random signs has at most the variance 2 |a|^2 |b|^2; draws
            # of different samples and seeds are independent. 4 standard errors: 1 in 16,000.
            energies = first.square().sum(1) * second.square().sum(1)
            error = math.sqrt(2.0 * float(energies.sum()) / seeds)
            found = float(mean[index[one], index[two]])
            assert found == pytest.approx(exact, abs=4.0 * error)
            if one == two:
                assert 4.0 * error < 0.25 * exact  # so that the above says something


def test_the_noise_of_all_sites_is_predicted() -> None:
    """All sites quantized at once, to first order: within a decibel of the run."""
    model, x = chain(10, depth=6), normal(256, 16)
    quantizer = ready(model, x)
    ranking = quantizer.sensitivity(fresh(quantizer, model, x))
    actual = sqnr(model(x), quantizer.quantize(model)(x))
    # The estimate has a standard error of sqrt(2 / 256) = 9 %, 0.4 dB; each rounding of an input
    # that carries noise itself is another draw.
    assert ranking.predicted() == pytest.approx(actual, abs=1.0)


@pytest.mark.parametrize("metric", ["output", "sqnr"])
@pytest.mark.parametrize("name", ["mlp", "small_cnn", "tiny_transformer"])
def test_local_sqnr_is_that_of_the_layer_alone(name: str, metric: str) -> None:
    model, x = MODELS[name](), example(name, 8)
    quantizer = calibrated(model, [(x, {})], backend="reference")
    ranking = quantizer.sensitivity(fresh(quantizer, model, *x, metric=metric))
    layers = dict(model.named_modules())
    taken: dict[str, list[Tensor]] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _m, args, out, name=name: taken.__setitem__(name, [args[0].clone(), out.clone()])
        )
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear)
    ]
    model(*x)
    for hook in hooks:
        hook.remove()
    assert taken
    for site, (inputs, result) in taken.items():
        one = nn.Sequential(layers[site])
        alone = ready(one, inputs, module_filter=ModuleFilter(include_names="0"))
        expected = sqnr(result, alone.quantize(one)(inputs))
        # Float32 sums of squares of the same numbers.
        assert ranking.of(site).local_sqnr == pytest.approx(expected, abs=0.01)
        if metric == "sqnr":
            assert ranking.of(site).score == pytest.approx(10.0 ** (-expected / 10.0), rel=0.01)
            assert ranking.of(site).predicted_output_sqnr is None


def test_the_shares_of_weight_and_activations() -> None:
    """A layer with a 3-bit weight errs by its weight, one with 3-bit activations by those."""
    from torch_quant import QConfig, QuantSpec

    few = QuantSpec.of(bits=3, signed=True, symmetric=True, per_channel=True)
    model, x = MODELS["mlp"](), example("mlp", 32)
    quantizer = ready(
        model,
        *x,
        overrides={"0": QConfig(weight=few), "2": QConfig(input=QuantSpec.of(bits=3))},
    )
    for metric in ("output", "sqnr"):
        ranking = quantizer.sensitivity(fresh(quantizer, model, *x, metric=metric))
        assert ranking.of("0").weight_share > 0.95
        assert ranking.of("2").activation_share > 0.95
        for site in ranking:
            assert site.weight_share + site.activation_share == pytest.approx(1.0)


class Twice(nn.Module):
    """In pieces, and one piece is called twice: one site, two noises, which may cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            return x
        return self.head(self.layer(self.layer(x)))


def test_a_site_called_twice_has_the_sum_of_both_effects() -> None:
    model, x = seeded(Twice), normal(16, 16)
    quantizer = ready(model, x)
    amp_model = fresh(quantizer, model, x)
    y = model.layer(x)
    one = nn.Sequential(model.layer)
    alone = calibrated(one, [((x,), {}), ((y,), {})], backend="reference").quantize(one)
    first, second = alone(x) - y, alone(y) - model.layer(y)
    total = (first @ model.layer.weight.T + second) @ model.head.weight.T
    assert set(amp_model.recorder.sites) == {"layer", "head"}
    # The noise is the small difference of two float32 outputs.
    assert amp_model.recorder.gram.of_site("layer") == pytest.approx(
        float(total.square().sum()), rel=1e-3
    )


def test_scores_do_not_depend_on_how_the_data_are_split() -> None:
    model, x = chain(1), normal(12, 16)
    quantizer = ready(model, x)
    whole, split = fresh(quantizer, model, x), quantizer.amp(model)
    for part in x.split(5):
        split(part)
    for name, stats in whole.recorder.sites.items():
        other = split.recorder.sites[name]
        # Products of another batch size may sum in another order.
        assert other.noise == pytest.approx(stats.noise, rel=1e-3)
        assert split.recorder.gram.of_site(name) == pytest.approx(
            whole.recorder.gram.of_site(name), rel=1e-3
        )


# ---- models that cannot be differentiated


class Heads(nn.Module):
    def __init__(self, finish: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.l0, self.l1, self.finish = nn.Linear(16, 16), nn.Linear(16, 8), finish

    def forward(self, x: Tensor) -> Any:
        return self.finish(self.l1(self.l0(x).relu()))


def spoiled(y: Tensor) -> Tensor:
    z = y.exp()  # whose gradient needs its result
    z.add_(1.0)
    return z


def through_numpy(y: Tensor) -> Tensor:
    return torch.from_numpy(y.numpy().clip(-1.0, 1.0))


CUT: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda y: y.argmax(1),
    "integers": lambda y: (10.0 * y).round().int(),
    "detach": lambda y: y.detach(),
    "in place": spoiled,
    "numpy": through_numpy,
}


@pytest.mark.parametrize("cut", CUT)
def test_a_model_without_gradient_is_ranked_by_local_noise(
    cut: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = seeded(lambda: Heads(CUT[cut]))
    quantizer = ready(model, normal(16, 16))
    before = snapshot(model)
    amp_model = quantizer.amp(model)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        for batch in (8, 3):
            for mode in (torch.no_grad, torch.enable_grad):
                with mode():
                    expected = run(model.requires_grad_(False), ((normal(batch, 16),), {}))
                    model.requires_grad_(True)
                    assert_same(amp_model(normal(batch, 16)), expected)
    assert_unchanged(model, before)
    ranking = quantizer.sensitivity(amp_model)
    assert ranking.metric == amp_model.metric == "sqnr"
    assert 'ranked by "sqnr": the model cannot be differentiated' in ranking.note
    assert 'ranked by "sqnr"' in str(ranking)
    assert caplog.text.count('ranked by "sqnr"') == 1
    assert ranking.batches == 4
    plain = quantizer.amp(model, metric="sqnr")
    for batch in (8, 8, 3, 3):
        plain(normal(batch, 16))
    expected_ranking = quantizer.sensitivity(plain)
    assert ranking.names == expected_ranking.names
    for site in expected_ranking:
        assert ranking.of(site.name).score == pytest.approx(site.score)
        assert 0.0 < site.weight_share < 1.0
    assert quantizer.fallback(amp_model, 1) == ranking.names[:1]


def test_after_one_batch_the_shares_are_those_of_local_noise_too() -> None:
    model = seeded(lambda: Heads(CUT["argmax"]))
    quantizer = ready(model, normal(16, 16))
    found = quantizer.sensitivity(fresh(quantizer, model, normal(8, 16)))
    expected = quantizer.sensitivity(fresh(quantizer, model, normal(8, 16), metric="sqnr"))
    for site in expected:
        assert found.of(site.name).weight_share == pytest.approx(site.weight_share)


class Aside(nn.Module):
    """``aside`` decides which values are kept, and no gradient comes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.aside = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) * (self.aside(x) > 0)


def test_sites_that_no_gradient_reaches_are_named() -> None:
    model = seeded(Aside)
    quantizer = ready(model, normal(16, 16))
    ranking = quantizer.sensitivity(fresh(quantizer, model, normal(8, 16)))
    assert ranking.metric == "output"
    assert ranking.note == "no gradient reaches them, so their score is 0: aside"
    assert ranking.names == ["main", "aside"]
    assert ranking.of("aside").score == 0.0
    assert math.isfinite(ranking.of("aside").local_sqnr)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) if float(x.detach().sum()) > 0 else self.down(x)


def test_sites_that_saw_no_data_are_named() -> None:
    model, x = seeded(Branches), normal(8, 16).abs()
    quantizer = calibrated(model, [((x,), {}), ((-x,), {})], backend="reference")
    ranking = quantizer.sensitivity(fresh(quantizer, model, x))
    assert ranking.note == "saw no data: down"
    assert ranking.of("down").score == 0.0
    assert ranking.of("up").score > 0.0


def test_a_model_without_sites() -> None:
    model = nn.Sequential(nn.ReLU())
    quantizer = Quantizer("reference")
    quantizer.calib(model)(normal(4, 16))
    amp_model = quantizer.amp(model)
    assert_same(amp_model(normal(4, 16)), model(normal(4, 16)))
    ranking = quantizer.sensitivity(amp_model)
    assert len(ranking) == 0
    assert "no site ran" in str(ranking)
    assert quantizer.fallback(amp_model, 0) == []


# ---- a loss of the user's


@pytest.mark.parametrize("call", ["one", "several", "keywords"])
def test_loss_fn_is_given_outputs_and_batch(call: str) -> None:
    model, x = MODELS["tiny_transformer"](), example("tiny_transformer", 8)
    quantizer = calibrated(model, [(x, {})], backend="reference")
    seen: list[tuple[Any, Any]] = []
    labels = torch.arange(8)

    def loss_fn(outputs: Any, batch: Any) -> Tensor:
        seen.append((outputs, batch))
        return F.cross_entropy(outputs, labels)

    amp_model = quantizer.amp(model, loss_fn=loss_fn)
    calls: dict[str, tuple[tuple[Tensor, ...], dict[str, Tensor]]] = {
        "one": (x[:1], {}),
        "several": (x, {}),
        "keywords": ((), {"ids": x[0], "mask": x[1]}),
    }
    args, kwargs = calls[call]
    assert_same(amp_model(*args, **kwargs), model(*args, **kwargs))
    ((outputs, batch),) = seen
    assert torch.equal(outputs, model(*args, **kwargs))
    if call == "one":
        assert torch.equal(batch, x[0])
    elif call == "several":
        assert isinstance(batch, tuple)
        assert all(map(torch.equal, batch, x))
    else:
        assert isinstance(batch, dict)
        assert set(batch) == {"ids", "mask"}
    ranking = quantizer.sensitivity(amp_model)
    assert ranking.metric == "loss"
    assert any(site.score > 0.0 for site in ranking)
    assert all(site.predicted_output_sqnr is None for site in ranking)
    assert "by its effect on the loss" in str(ranking)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda outputs, batch: outputs, r"gave a tensor of shape \(4, 10\); expected a scalar"),
        (lambda outputs, batch: None, "gave None; expected a scalar"),
        (lambda outputs, batch: float(outputs.detach().sum()), "expected a scalar"),
        (lambda outputs, batch: outputs.detach().sum(), "differentiable.*argmax"),
        (lambda outputs, batch: outputs.argmax(1).sum(), "differentiable.*argmax"),
    ],
    ids=["not a scalar", "None", "a number", "detached", "argmax"],
)
def test_a_loss_that_cannot_be_used(loss_fn: Callable[[Any, Any], Any], message: str) -> None:
    model = MODELS["mlp"]()
    quantizer = ready(model, *example("mlp", 16))
    amp_model = quantizer.amp(model, loss_fn=loss_fn)
    with pytest.raises(InvalidConfig, match=message):
        amp_model(*example("mlp", 4))
    assert amp_model.recorder.batches == 0
    assert amp_model.samples == []
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_raises_records_nothing() -> None:
    model = MODELS["mlp"]()
    quantizer = ready(model, *example("mlp", 16))
    fail = [False]

    def loss_fn(outputs: Tensor, batch: Tensor) -> Tensor:
        if fail[0]:
            raise KeyError("labels")
        return outputs.square().sum()

    amp_model = quantizer.amp(model, loss_fn=loss_fn)
    amp_model(*example("mlp", 4))
    before = facts(amp_model)
    fail[0] = True
    with pytest.raises(KeyError, match="labels"):
        amp_model(*example("mlp", 4))
    assert facts(amp_model) == before


def test_loss_fn_under_every_grad_mode() -> None:
    model, x = MODELS["mlp"](), example("mlp", 4)
    quantizer = ready(model, *example("mlp", 16))
    found = []
    for mode in MODES.values():
        amp_model = quantizer.amp(model, loss_fn=lambda outputs, batch: outputs.square().mean())
        with mode():
            assert_same(amp_model(*x), model(*x).detach())
        found.append(amp_model.recorder.gram.matrix)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


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


def test_where_calibration_never_went() -> None:
    """A branch without ranges is refused, and leaves the model as quantizable as it was."""
    case = CASES["branch_switches"]
    model = case.build()
    quantizer = calibrated(model, case.ones())
    expected = run(quantizer.quantize(model), case.inputs(1))
    with pytest.raises(NotCalibrated, match="no calibration data passed"):
        run(quantizer.amp(model), case.inputs(3))
    assert torch.equal(run(quantizer.quantize(model), case.inputs(1)), expected)
