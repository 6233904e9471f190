"""Methods that want data, and mixtures of experts whose weights are one tensor."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_experts import moe as of_layers
from test_experts import tokens
from torch import nn

from torch_quant import (
    AWQ,
    FLOAT,
    GPTQ,
    AutoRound,
    PerGroup,
    QConfig,
    Quantizer,
    QuantSpec,
    RoundToNearest,
    sqnr,
)
from torch_quant.errors import InvalidConfig
from torch_quant.statistics import HESSIAN, Hessian

SPEC = QuantSpec.of("int4", granularity=PerGroup(16))


def moe(kind: str) -> nn.Module:
    """Of two layers: methods go from one to the next."""
    return of_layers(kind, 2)


def quantizer_of(method: Any, transforms: Any = ()) -> Quantizer:
    config = QConfig(FLOAT, SPEC, method=method, transforms=transforms)
    return Quantizer("reference", qconfig=config, capture="modules")


def plain_experts(model: nn.Module) -> dict[str, Any]:
    """Their codes without data, over the full range."""
    quantizer = quantizer_of(RoundToNearest(full_range=True))
    made = quantizer.quantize(model, example_inputs={"input_ids": tokens(2, 12)})
    return experts_of(model, made.state_dict())


def experts_of(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    return {name: state[name] for name, x in model.named_parameters() if ".experts." in name}


def some() -> Any:
    """Batches of text that goes to all experts."""
    return [{"input_ids": tokens(8, 12)}, {"input_ids": tokens(8, 12).flip(1)}]


@pytest.mark.thin
@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
@pytest.mark.parametrize(
    ("method", "transforms"),
    [
        (GPTQ(full_range=True), ()),
        (RoundToNearest(clip_search=True, weighted=True, full_range=True), ()),
        (GPTQ(full_range=True, match_float=True), (AWQ(),)),
    ],
    ids=["gptq", "weighted", "awq"],
)
def test_experts_are_rounded_with_data(
    kind: str, method: Any, transforms: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = moe(kind), tokens(2, 12)
    quantizer = quantizer_of(method, transforms)
    with caplog.at_level(logging.WARNING):
        made = quantizer.round_weights(model, some(), progress=False)
    assert not any("without data" in each.message for each in caplog.records)
    assert sum("experts" in site for site in made.sites) == 4
    quant_model = quantizer.quantize(model, example_inputs={"input_ids": x})
    found, plain = experts_of(model, quant_model.state_dict()), plain_experts(model)
    matrices = [name for name, value in model.named_parameters() if value.dim() == 3]
    assert len([name for name in matrices if "experts" in name]) == 4
    for name in matrices:
        assert not torch.equal(found[name], plain[name])
    with torch.no_grad():
        assert sqnr(model(x).logits, quant_model(x).logits) > 8  # 4 bits; a token may go elsewhere


@pytest.mark.parametrize(
    "kind", ["mixtral", "gpt-oss"]
)  # [experts, out, in] and [experts, in, out]
def test_each_expert_has_the_moments_of_its_own_tokens(kind: str) -> None:
    """Its codes are those of GPTQ for the rows that the router sends to it, computed here."""
    model, method = moe(kind), GPTQ(full_range=True)
    linear = QConfig(FLOAT, SPEC, method=RoundToNearest())
    quantizer = Quantizer(
        "reference",
        qconfig=QConfig(FLOAT, SPEC, method=method),
        overrides={"linear": None, "embedding": None},
        capture="modules",
    )
    batches = some()
    with pytest.raises(InvalidConfig, match="no weight of a linear layer"):
        quantizer.round_weights(model, batches, progress=False)
    head = {"model.layers.1.self_attn.o_proj": linear}  # behind the experts of the first block
    quantizer.overrides = {**head, "linear": None, "embedding": None}
    quantizer.round_weights(model, batches, progress=False)
    experts = model.model.layers[0].mlp.experts
    inputs: list[Any] = []
    with (
        torch.no_grad(),
        experts.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append((*args, *kwargs.values())), with_kwargs=True
        ),
    ):
        for batch in batches:
            model(**batch)
    site = quantizer.state.rounded.sites["model.layers.0.mlp.experts.grouped_linear"]
    weight = experts.gate_up_proj.detach()
    weight = weight.transpose(1, 2) if kind == "gpt-oss" else weight
    codes = site.codes.reshape(weight.shape)
    for number, matrix in enumerate(weight):
        moments = Hessian()
        for x, index, *_ in inputs:
            rows = x.reshape(-1, x.shape[-1])[(index == number).any(-1)]
            if len(rows):
                moments.observe(rows)
        expected, _ = method.quantize(matrix.contiguous(), SPEC.on(0), {HESSIAN: moments})
        # sums of other orders may round a tie otherwise
        assert (codes[number] != expected).float().mean() < 0.01


def test_experts_whose_parameters_share_memory_are_rounded_with_data() -> None:
    """As in models whose weights lie in one flat tensor: each is known by where it begins."""
    codes = []
    for flat in (False, True):
        model = moe("gpt-oss")
        for layer in model.model.layers if flat else ():
            experts = layer.mlp.experts
            named = [(name, x) for name, x in experts.named_parameters() if x.dim() == 3]
            whole, start = torch.cat([x.detach().flatten() for _, x in named]), 0
            for name, x in named:
                part = whole[start : start + x.numel()].view(x.shape)
                experts._parameters[name] = nn.Parameter(part)
                start += x.numel()
        quantizer = quantizer_of(GPTQ(full_range=True))
        made = quantizer.round_weights(model, some(), progress=False)
        assert sum("experts" in site for site in made.sites) == 4
        state = quantizer.quantize(model, example_inputs={"input_ids": tokens(2, 12)}).state_dict()
        codes.append(experts_of(model, state))
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])


def test_an_expert_without_tokens_is_rounded_to_nearest(caplog: pytest.LogCaptureFixture) -> None:
    model = moe("mixtral")
    few = [{"input_ids": torch.tensor([[5]])}]  # two experts of four
    quantizer = quantizer_of(GPTQ(full_range=True))
    with caplog.at_level(logging.WARNING):
        quantizer.round_weights(model, few, progress=False)
    told = [each.message for each in caplog.records if "no token was sent to it" in each.message]
    assert len(told) == 1
    assert "grouped_linear[" in told[0]
    found = experts_of(model, quantizer.quantize(model).state_dict())
    plain = plain_experts(model)
    name = "model.layers.0.mlp.experts.down_proj"
    pairs = zip(found[name].reshape(4, -1), plain[name].reshape(4, -1), strict=True)
    same = [torch.equal(*pair) for pair in pairs]
    assert sorted(same) == [False, False, True, True]


def test_gptq_of_experts_beats_round_to_nearest() -> None:
    """Of the products' outputs: a token that goes elsewhere is no measure of rounding."""
    model = moe("mixtral")
    errors = []
    for method in (RoundToNearest(full_range=True), GPTQ(full_range=True)):
        quantizer = quantizer_of(method)
        batches = [{"input_ids": tokens(16, 24)}]
        quantizer.round_weights(model, batches, progress=False)
        quant_model = quantizer.quantize(model)
        with torch.no_grad():
            exact, made = (
                each.model.layers[0](
                    model.model.embed_tokens(tokens(16, 24)),
                    position_embeddings=model.model.rotary_emb(
                        model.model.embed_tokens(tokens(16, 24)), torch.arange(24)[None]
                    ),
                )
                for each in (model, quant_model)
            )
        errors.append(sqnr(exact, made))
    assert errors[1] > errors[0] + 1.0


def test_finished_experts_are_found_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, codes = moe("qwen3"), []
    for _ in range(2):
        quantizer = quantizer_of(GPTQ(full_range=True))
        quantizer.round_weights(model, some(), progress=False, folder=tmp_path)
        codes.append(experts_of(model, quantizer.quantize(model).state_dict()))
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])


def test_other_products_with_experts_are_rounded_without_data(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = moe("mixtral")
    monkeypatch.setattr("torch_quant.rounding.experts._operands", lambda *args: None)
    quantizer = quantizer_of(GPTQ(full_range=True))
    with caplog.at_level(logging.WARNING):
        made = quantizer.round_weights(model, some(), progress=False)
    (told,) = [each.message for each in caplog.records if "without data" in each.message]
    assert "model.layers.0.mlp.experts." in told
    assert not any("experts" in site for site in made.sites)
    found, plain = (
        experts_of(model, quantizer.quantize(model).state_dict()),
        plain_experts(model),
    )
    assert all(torch.equal(found[name], plain[name]) for name in found)


@pytest.mark.parametrize("full_range", [True, False])
def test_a_method_that_refuses_experts_is_replaced_and_told(
    full_range: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, method = moe("mixtral"), AutoRound(iterations=2, full_range=full_range)
    quantizer = quantizer_of(method)
    with caplog.at_level(logging.WARNING):
        quantizer.round_weights(model, some(), progress=False)
    (told,) = [each.message for each in caplog.records if "refuses them" in each.message]
    assert told.startswith("rounded by rtn")
    layers = "the linear layers and convolutions of a block"
    assert f"as autoround refuses them (it works on {layers})" in told
    found = experts_of(model, quantizer.quantize(model).state_dict())
    plain = plain_experts(model)
    assert all(torch.equal(found[name], plain[name]) == full_range for name in found)
    assert "rtn" in str(quantizer.explain("model.layers.0.mlp.experts.grouped_linear"))


def test_calibrated_experts_have_data() -> None:
    """By a calib proxy, all experts of a tensor share the moments of the rows that they read."""
    model = moe("mixtral")
    quantizer = quantizer_of(GPTQ(full_range=True))
    quantizer.calib(model)(tokens(8, 12))
    found, expected = (
        experts_of(model, quantizer.quantize(model).state_dict()),
        plain_experts(model),
    )
    assert not any(torch.equal(found[name], expected[name]) for name in found)


def test_what_blocks_found_goes_before_calibration() -> None:
    model = moe("mixtral")
    quantizer = quantizer_of(GPTQ(full_range=True))
    quantizer.calib(model)(tokens(8, 12))
    calibrated = experts_of(model, quantizer.quantize(model).state_dict())
    quantizer.round_weights(model, some(), progress=False)
    again = experts_of(model, quantizer.quantize(model).state_dict())
    assert not any(torch.equal(again[name], calibrated[name]) for name in again)
