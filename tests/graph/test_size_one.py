"""A graph serves sizes of 1, though exported without: where it was seen to be right, only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from capturing import Compute, capture, executor, serve
from models import normal, seeded
from torch import Tensor, nn

from torch_quant import Backend, Quantizer
from torch_quant.core.metrics import sqnr
from torch_quant.graph.calls import flatten_call
from torch_quant.graph.shapes import ShapeContract

pytestmark = pytest.mark.sparse

SIZES = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def language_model(name: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES, **IDS, intermediate_size=48)
    config.use_cache = False
    build = {"Bert": "BertModel"}.get(name, f"{name}ForCausalLM")
    if name == "GPT2":
        build = "GPT2LMHeadModel"
    return getattr(transformers, build)(config)


@pytest.mark.parametrize("name", ["Bert", "GPT2", "Llama"])
@torch.no_grad()
def test_language_models_serve_one_token(name: str) -> None:
    torch.manual_seed(0)
    model = language_model(name).eval()
    run, submodule = executor(model)
    for batch, length in ((2, 16), (3, 8), (2, 1), (1, 1), (3, 1), (1, 9)):
        ids = torch.randint(1, 64, (batch, length))
        actual, expected = run(input_ids=ids), model(input_ids=ids)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    assert len(submodule.graphs) == 1


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.ONEDNN])
@pytest.mark.parametrize("name", ["Bert", "Llama"])
@torch.no_grad()
def test_quantized_language_models_serve_one_token(name: str, backend: Backend) -> None:
    torch.manual_seed(0)
    model = language_model(name).eval()
    quantizer = Quantizer(backend)
    proxy = quantizer.calib(model)
    for length in (16, 32):
        proxy(input_ids=torch.randint(1, 64, (2, length)))
    quantized = quantizer.quantize(model)
    assert quantizer.plan.quantized
    for batch, length in ((1, 1), (2, 1), (3, 1), (1, 7)):
        ids = torch.randint(1, 64, (batch, length))
        actual, expected = quantized(input_ids=ids)[0], model(input_ids=ids)[0]
        assert actual.shape == expected.shape
        assert sqnr(expected, actual) > 15  # random weights: 20 to 40 dB were seen


@torch.no_grad()
def test_a_transformer_encoder_serves_one_token() -> None:
    layer = seeded(lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True))
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    graph = capture(model, normal(2, 16, 32))
    for shape in ((2, 1, 32), (1, 1, 32), (5, 1, 32), (3, 7, 32)):
        torch.testing.assert_close(
            serve(graph, normal(*shape)), model(normal(*shape)), rtol=1e-5, atol=1e-5
        )


PATHS: dict[str, Callable[[Tensor], Tensor]] = {
    "one alone": lambda x: x * 2 if x.shape[1] > 1 else x - 1,
    "another limit": lambda x: x * 2 if x.shape[1] > 3 else x - 1,
    "only batch and length": lambda x: x - 1 if x.shape[0] == x.shape[1] == 1 else x * 2,
    "product": lambda x: x * 2 if x.shape[0] * x.shape[1] > 4 else x - 1,
    "one like many, two not": lambda x: x - 1 if x.shape[1] in (2, 3) else x * 2,
    "softmax": lambda x: x.softmax(1) if x.shape[1] > 1 else torch.ones_like(x),
    "squeeze": lambda x: x.squeeze(1).sum(-1, keepdim=True),
}


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", PATHS)
def test_no_call_gets_the_answer_of_another_path(name: str, batch: int) -> None:
    model = Compute(PATHS[name])
    run, _ = executor(model)
    run(normal(batch, 6, 8))
    for shape in ((1, 1, 8), (2, 1, 8), (4, 1, 8), (2, 2, 8), (1, 3, 8), (5, 1, 8), (3, 7, 8)):
        assert torch.equal(run(normal(*shape)), model(normal(*shape))), shape


def made(conditions: list[Any]) -> ShapeContract:
    return ShapeContract(["x"], [("s0", "s1")], conditions)


def fits(contract: ShapeContract, *shape: int) -> bool:
    return contract.mismatch(flatten_call((torch.zeros(shape),), {})) is None


def test_one_point_proves_itself_alone() -> None:
    batch, length = sympy.symbols("s0 s1", integer=True)
    contract = made([batch * length > 8, length > 1]).proven([{"s0": 2, "s1": 1}])
    assert fits(contract, 2, 1)
    assert fits(contract, 3, 4)
    for shape in ((2, 2), (1, 1), (4, 1), (3, 1)):
        assert not fits(contract, *shape)


def test_two_points_prove_every_value_between_which_they_differ() -> None:
    batch, length = sympy.symbols("s0 s1", integer=True)
    contract = made([sympy.Ne(batch * length, batch)])
    contract = contract.proven([{"s0": 2, "s1": 1}, {"s0": 1, "s1": 1}])
    assert fits(contract, 7, 1)
    assert fits(made([length > 3]).proven([{"s0": 2, "s1": 1}]), 9, 1)
    assert not fits(made([length > 3]).proven([{"s0": 2, "s1": 1}]), 9, 2)


def test_sizes_that_were_seen_to_be_wrong() -> None:
    contract = made([]).refusing({"s0": 1, "s1": 1})
    assert fits(contract, 2, 1)
    assert fits(contract, 1, 2)
    assert not fits(contract, 1, 1)


def test_calls_are_cut_down_with_what_follows_from_their_sizes() -> None:
    length = sympy.Symbol("s1", integer=True)
    contract = ShapeContract(["x", "y"], [("s0", "s1"), ("s0", "2*s1")], [], [(1, 1, 2 * length)])
    call = flatten_call((normal(3, 4), normal(3, 8)), {})
    other = contract.resized(call, {"s1": 1})
    assert other is not None
    assert [tuple(x.shape) for x in other.tensors] == [(3, 1), (3, 2)]
    assert contract.resized(call, {"s1": 5}) is None


class Halved(nn.Module):
    """At a size of 1 there is no second half, and the last one is the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.chunk(2, 1)[-1])


def test_sizes_that_are_tried_and_fail_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = seeded(Halved)
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    for x in (normal(3, 3, 8), normal(2, 1, 8), normal(2, 4, 8)):
        assert torch.equal(calib_model(x), model(x))
    quantizer.quantize(model)(normal(2, 1, 8))
    assert capfd.readouterr().err == ""
