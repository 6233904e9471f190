"""Hidden states and attention maps, which transformers collects by hooks of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import seeded, tokens
from torch import nn

from torch_quant import Quantizer, sqnr

pytest.importorskip("transformers.utils.output_capturing")

IDS = tokens(2, 6, 50)


def decoder() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32, "vocab_size": 50}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, attn_implementation="eager")
    return seeded(lambda: GPT2LMHeadModel(config)).eval()


@pytest.mark.parametrize(
    ("asked", "first"), [("output_hidden_states", True), ("output_attentions", False)]
)
@torch.no_grad()
def test_the_model_stays_one_graph(asked: str, first: bool) -> None:
    """The hooks are set while the graph is captured, and are no state."""
    model, reference = decoder(), decoder()
    calib_model = Quantizer("reference").calib(model)
    if not first:
        calib_model(IDS)
    mine, theirs = (run(IDS, **{asked: True}) for run in (calib_model, reference))
    assert not calib_model.captured.root.failure
    assert not any("hook" in name for name in calib_model.captured.root.written)
    names = {"output_hidden_states": "hidden_states", "output_attentions": "attentions"}
    pairs = list(zip(mine[names[asked]], theirs[names[asked]], strict=True))
    assert pairs
    for x, y in pairs:
        assert torch.equal(x, y)


@pytest.mark.parametrize("float_first", [True, False])
@torch.no_grad()
def test_a_quantized_model_gives_them_without_calibration_for_it(float_first: bool) -> None:
    """The float model with its hooks is the float model still."""
    model, quantizer = decoder(), Quantizer("reference")
    quantizer.calib(model)(IDS)
    quant_model = quantizer.quantize(model)
    if float_first:
        model(IDS, output_hidden_states=True)
    found = quant_model(IDS, output_hidden_states=True).hidden_states
    expected = model(IDS, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 2
    assert all(sqnr(y, x) > 20 for x, y in zip(found, expected, strict=True))


def test_hooks_for_gradients_and_saving_change_no_forward_pass() -> None:
    model, x = (
        seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))).eval(),
        torch.ones(2, 8),
    )
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    calib_model(x)
    graphs = list(calib_model.captured.root.graphs)
    model[0].register_full_backward_hook(lambda *_: None)
    model[1].register_state_dict_post_hook(lambda *_: None)
    quant_model = quantizer.quantize(model)
    assert sqnr(model(x), quant_model(x)) > 20
    assert torch.equal(calib_model(x), model(x))
    assert [graph for _, graph in calib_model.captured.root.graphs] == [
        graph for _, graph in graphs
    ]
