"""The AMP proxy gives the float model's output, bit for bit, and leaves the model as it is."""

from __future__ import annotations

import pytest
import torch
from amp_proxies import MODES, assert_same, ready
from flows import BACKENDS, CASES, assert_unchanged, calibrated, run, snapshot
from models import MODELS, example, normal, seeded
from thinning import third
from torch import Tensor, nn

WITHOUT_GRADIENT = ["in_place", "in_place_after_read"]  # a linear's input is written to
AWKWARD = [
    "branch_on_data",  # in pieces
    "loop_on_data",  # in pieces, a module called several times
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


@pytest.mark.thin
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


@pytest.mark.parametrize("name", third(AWKWARD, 0))
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
