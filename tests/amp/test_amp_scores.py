"""The scores of an AMP proxy are what they say they are: noise energies, by quantized runs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from amp_proxies import fresh, ready
from flows import BACKENDS, calibrated
from models import MODELS, example, normal, seeded
from torch import Tensor, nn

from torch_quant import ModuleFilter, QConfig, Quantizer, recipes, sqnr


def chain(outputs: int, depth: int = 4) -> nn.Sequential:
    """Linear layers without anything between them: what is said of them to first order is exact."""
    widths = [16] * depth + [outputs]
    return seeded(lambda: nn.Sequential(*(nn.Linear(*w) for w in itertools.pairwise(widths))))


PLAIN = recipes.int8_static(smooth=None)
"""A site that is quantized alone has no layer that would compute copies of channels for it."""


def output_noise(model: nn.Module, quantizer: Quantizer, site: str, x: Tensor) -> Tensor:
    """What quantizing only ``site`` adds to the output, by a quantized run; float64."""
    only, qconfig = ModuleFilter(include_names=site), quantizer.qconfig
    alone = Quantizer(quantizer.backend, module_filter=only, qconfig=qconfig)
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
    quantizer = ready(model, x, backend=backend, qconfig=PLAIN)
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
    quantizer = ready(model, x, qconfig=PLAIN)
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
    plain = QConfig()  # biases are corrected for the data at hand, which is another for one layer
    quantizer = calibrated(model, [(x, {})], backend="reference", qconfig=plain)
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
        only = ModuleFilter(include_names="0")
        alone = ready(one, inputs, qconfig=plain, module_filter=only)
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
