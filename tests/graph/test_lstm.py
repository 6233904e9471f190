"""LSTMs: captured for every length, and the int8 simulation against PyTorch's own LSTM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capturing import canonical, capture, serve, sites_of
from models import normal
from torch import Tensor, nn

from torch_quant.ops.recurrent import LSTM, cells_of, hidden_states
from torch_quant.ops.table import pattern_of
from torch_quant.passes.prepare import prepare

aten = torch.ops.aten

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "layers": {"num_layers": 3},
    "both": {"bidirectional": True},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
}


def made(form: str) -> tuple[nn.LSTM, Tensor, list[Tensor]]:
    """An LSTM, an input of length 7 and batch 3, and an initial state."""
    torch.manual_seed(0)
    model = nn.LSTM(8, 6, **FORMS[form]).eval()
    x = normal(3, 7, 8) if model.batch_first else normal(7, 3, 8)
    cells = model.num_layers * (2 if model.bidirectional else 1)
    return model, x, [normal(cells, 3, 6, salt=i).tanh() for i in (1, 2)]


def grid(scale: float, zero_point: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_on_a_fine_grid_the_simulation_is_pytorchs_lstm(form: str) -> None:
    model, x, hx = made(form)
    shape = (model.bias, model.num_layers, model.bidirectional, model.batch_first)
    actual = LSTM(x, hx, model._flat_weights, *shape, *grid(2.0**-15, 0), "int16")
    output, (h_n, c_n) = model(x, tuple(hx))
    for got, expected in zip(actual, (output, h_n, c_n), strict=True):
        # Each of the 7 steps rounds the hidden state by 2**-16 at most, and halves what it got.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_hidden_states_lie_on_the_grid_and_cell_states_do_not(form: str) -> None:
    model, x, hx = made(form)
    shape = (model.bias, model.num_layers, model.bidirectional, model.batch_first)
    output, h_n, c_n = LSTM(x, hx, model._flat_weights, *shape, *grid(2.0**-5, 3), "uint6")
    for hidden in (output, h_n):
        assert torch.equal((hidden * 32).round(), hidden * 32)
        assert -3 / 32 <= float(hidden.min()) <= float(hidden.max()) <= 60 / 32
    assert not torch.equal((c_n * 32).round(), c_n * 32)


@torch.no_grad()
def test_all_hidden_states_are_observed() -> None:
    model, x, hx = made("all")
    options = (model.bias, 2, 0.0, False, True, True)
    found = hidden_states(x, hx, model._flat_weights, *options)
    output, (h_n, _) = model(x, tuple(hx))
    assert found.numel() == hx[0].numel() + 2 * output.numel()
    known = set(found.tolist())
    assert known >= {*hx[0].flatten().tolist(), *output.flatten().tolist(), *h_n.flatten().tolist()}


def test_cells() -> None:
    assert cells_of([1, 2, 3, 4, 5, 6, 7, 8], True) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert cells_of([1, 2, 3, 4], False) == [[1, 2], [3, 4]]


@pytest.mark.parametrize("form", FORMS)
def test_one_capture_serves_every_length_and_batch(form: str) -> None:
    model, x, _ = made(form)
    graph = capture(model, x)
    targets = {node.target for node in graph.gm.graph.nodes}
    assert aten.lstm.input in targets
    assert not any("whole_lstm" in str(target) for target in targets)
    for shape in ((2, 5, 8), (4, 11, 8), (1, 1, 8)):
        other = normal(*shape)
        output, (h_n, c_n) = serve(graph, other)
        expected, (h, c) = model(other)
        assert torch.equal(output, expected)
        assert torch.equal(h_n, h)
        assert torch.equal(c_n, c)


def test_nothing_of_pytorch_stays_changed() -> None:
    before = torch._VF.lstm
    capture(nn.LSTM(4, 4).eval(), normal(3, 2, 4))
    assert torch._VF.lstm is before


def test_a_site_of_one_module() -> None:
    gm = canonical(nn.Sequential(nn.LSTM(8, 6)).eval(), normal(5, 3, 8))
    (site,) = sites_of(gm)
    assert (site.name, site.op) == ("0", "lstm")
    assert site.internals == ("0.hidden",)


def test_projections_are_refused() -> None:
    model = nn.LSTM(8, 6, 2, proj_size=3, bias=False).eval()
    prepared = prepare(capture(model, normal(5, 3, 8)).gm)
    ((site, reason),) = prepared.sites
    assert site.op == "lstm"
    assert reason == "an LSTM with projections (proj_size) has no int8 kernel"


def test_weights_computed_from_the_data_make_no_site() -> None:
    class Dynamic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            hx = [x.new_zeros(1, x.size(1), 2)] * 2
            params = [x[0, :1].repeat(8, 1), x[0, 0, :2].repeat(8, 1)]
            return torch.lstm(x, hx, params, False, 1, 0.0, False, False, False)[0]

    gm = canonical(Dynamic(), normal(3, 2, 8))
    assert any(pattern_of(node) for node in gm.graph.nodes)
    assert not sites_of(gm)
