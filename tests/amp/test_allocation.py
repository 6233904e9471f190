"""Bits by effect: which site gets which format."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from torch_quant import InvalidConfig, NotCalibrated, QConfig, Quantizer, recipes
from torch_quant.core.metrics import sqnr

CANDIDATES = {str(bits): recipes.weight_only(bits=bits, group_size=16) for bits in (2, 3, 4, 6, 8)}


class Uneven(nn.Module):
    """Layers that the outputs depend on to very different degrees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 64)
        self.strong, self.weak = nn.Linear(64, 64), nn.Linear(64, 64)
        self.last = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y: Tensor = self.last(self.strong(x) + 0.01 * self.weak(x))
        return y


def inputs() -> Tensor:
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(1))


def probed(model: nn.Module, *batches: Any, **options: Any) -> tuple[Quantizer, Any]:
    quantizer = Quantizer("reference", qconfig=CANDIDATES["4"])
    amp_model = quantizer.amp(model, **{"candidates": CANDIDATES, **options})
    for batch in batches:
        amp_model(**batch) if isinstance(batch, dict) else amp_model(batch)
    return quantizer, amp_model


def test_what_the_outputs_depend_on_gets_the_bits() -> None:
    model, x = Uneven().eval(), inputs()
    quantizer, amp_model = probed(model, x)
    found = quantizer.allocate(amp_model, bits_per_weight=6.0)
    bits = {site: choice.bits for site, choice in found.chosen.items()}
    assert bits["weak"] < bits["strong"]
    assert found.bits_per_weight <= 6.0
    assert "4 sites: 5." in str(found) or "4 sites: 6.00" in str(found)
    quant_model = quantizer.quantize(model)
    plan = quant_model.quantization.plan
    for site, choice in found.chosen.items():
        assert plan[site].weight == replaced(CANDIDATES[choice.candidate], plan[site].weight)
    measured = sqnr(model(x), quant_model(x))
    assert abs(measured - found.predicted) < 1.5  # first order, and 64 draws
    uniform = Quantizer("reference", qconfig=CANDIDATES["4"])
    even = sqnr(model(x), uniform.quantize(model, example_inputs=x)(x))
    assert found.uniform["4"][0] == 6.0  # 4 bits and a float32 for 16 of them
    assert measured > even + 3.0  # of the same bits


def replaced(config: QConfig, like: Any) -> Any:
    from dataclasses import replace

    assert config.weight is not None
    return replace(config.weight, granularity=like.granularity)


@pytest.mark.parametrize("budget", [4.5, 5.0, 6.0, 7.3, 10.0])
def test_the_choice_is_the_best_there_is(budget: float) -> None:
    model = Uneven().eval()
    quantizer, amp_model = probed(model, inputs())
    found = quantizer.allocate(amp_model, bits_per_weight=budget)
    scores = {key: each.score for key, each in amp_model.recorder.candidates.items()}
    sizes = {"first": 2048, "strong": 4096, "weak": 4096, "last": 1024}
    best = math.inf
    for bits in itertools.product(CANDIDATES, repeat=4):
        pairs = list(zip(sizes, bits, strict=True))
        if sum(sizes[s] * (int(b) + 2) for s, b in pairs) <= budget * sum(sizes.values()):
            best = min(best, sum(scores[pair] for pair in pairs))
    chosen = sum(each.score for each in found.chosen.values())
    assert chosen == pytest.approx(best, rel=1e-3)  # the solver's gap is 1e-4 of the worst


def test_the_fewest_bits_for_an_error() -> None:
    model, x = Uneven().eval(), inputs()
    quantizer, amp_model = probed(model, x)
    few, many = (quantizer.allocate(amp_model, min_sqnr=goal) for goal in (15.0, 35.0))
    assert few.bits_per_weight < many.bits_per_weight
    assert few.predicted >= 15.0
    assert many.predicted >= 35.0
    assert sqnr(model(x), quantizer.quantize(model)(x)) > 33.0


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_decoder_whose_head_is_tied() -> None:
    """Sites that share a weight get one format, and it counts once."""
    model = llama()
    ids = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "use_cache": False}
    quantizer, amp_model = probed(model, batch)
    found = quantizer.allocate(amp_model, bits_per_weight=6.0)
    head, embedding = found.chosen["lm_head"], found.chosen["model.embed_tokens"]
    assert head.candidate == embedding.candidate
    assert sum(found.sizes.values()) == sum(x.numel() for x in model.parameters() if x.dim() > 1)
    again = Quantizer.from_config(json.loads(json.dumps(quantizer.to_config())))
    ours = quantizer.quantize(model)(ids).logits
    assert torch.equal(again.quantize(model, example_inputs=batch)(ids).logits, ours)
    quantizer.round_weights(model, [batch], progress=False)
    assert torch.equal(quantizer.quantize(model)(ids).logits, ours)


def test_the_proxy_is_the_float_model_still() -> None:
    model, x = Uneven().eval(), inputs()
    quantizer, amp_model = probed(model)
    assert torch.equal(amp_model(x), model(x))
    plain = Quantizer("reference", qconfig=CANDIDATES["4"])
    other = plain.amp(model)
    other(x)
    ours, theirs = quantizer.sensitivity(amp_model), plain.sensitivity(other)
    assert [(s.name, s.score) for s in ours] == [(s.name, s.score) for s in theirs]
    four = amp_model.recorder.candidates["strong", "4"]
    assert four.score == pytest.approx(ours.of("strong").score, rel=0.02)  # noise as bfloat16


def test_mistakes() -> None:
    model, x = Uneven().eval(), inputs()
    quantizer, amp_model = probed(model)
    with pytest.raises(NotCalibrated, match="no data was run through the AMP proxy"):
        quantizer.allocate(amp_model, bits_per_weight=5.0)
    amp_model(x)
    with pytest.raises(InvalidConfig, match="takes one of bits_per_weight= and min_sqnr="):
        quantizer.allocate(amp_model)
    with pytest.raises(InvalidConfig, match=r"bits_per_weight=1.0: the candidates take at least 4"):
        quantizer.allocate(amp_model, bits_per_weight=1.0)
    with pytest.raises(InvalidConfig, match="min_sqnr=200: the candidates reach"):
        quantizer.allocate(amp_model, min_sqnr=200)
    plain, proxy = probed(model, x, candidates=None)
    with pytest.raises(InvalidConfig, match="has no candidates"):
        plain.allocate(proxy, bits_per_weight=5.0)
    with pytest.raises(InvalidConfig, match="another model or another quantizer"):
        Quantizer("reference").allocate(amp_model, bits_per_weight=5.0)
    with pytest.raises(InvalidConfig, match="two candidates are s4 symmetric per-group"):
        quantizer.amp(model, candidates=[CANDIDATES["4"], CANDIDATES["4"]])
    with pytest.raises(InvalidConfig, match="expected a name and a QConfig"):
        quantizer.amp(model, candidates={"x": 4})  # type: ignore[dict-item]
    local, proxy = probed(model, x, metric="sqnr")
    with pytest.raises(NotCalibrated, match="needs noise at the outputs"):
        local.allocate(proxy, bits_per_weight=5.0)
    quantizer.allocate(amp_model, bits_per_weight=5.0)  # scores hold whatever was chosen before
    with torch.no_grad():
        model.strong.weight.mul_(2)
    with pytest.raises(NotCalibrated, match="weights changed since"):
        quantizer.allocate(amp_model, bits_per_weight=6.0)


def test_names_that_look_like_patterns() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(32, 32)
            self.parts = nn.ModuleDict({"[x]": nn.Linear(32, 32)})

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.parts["[x]"](torch.relu(self.linear(x)))
            return y

    model, x = Odd().eval(), inputs()
    quantizer, amp_model = probed(model, x)
    found = quantizer.allocate(amp_model, bits_per_weight=6.0)
    plan = quantizer.quantize(model).quantization.plan
    for site, choice in found.chosen.items():
        config = CANDIDATES[choice.candidate]
        assert config.weight is not None
        assert plan[site].weight is not None
        assert plan[site].weight.bits == config.weight.bits


def test_after_and_before_rounding() -> None:
    """Methods and scales of blocks do not keep an AMP proxy from measuring, nor does rounding."""
    from dataclasses import replace

    from torch_quant import AWQ, AutoRound

    model, x = Uneven().eval(), inputs()
    config = replace(CANDIDATES["4"], method=AutoRound(iterations=2), transforms=(AWQ(),))
    quantizer = Quantizer(config, backend="reference")
    for _ in range(2):
        amp_model = quantizer.amp(model, candidates=CANDIDATES)
        assert torch.equal(amp_model(x), model(x))
        assert len(quantizer.sensitivity(amp_model)) == 4
        quantizer.round_weights(model, [x], progress=False)
        quantizer.quantize(model)
    with pytest.raises(InvalidConfig, match="expected a dict or a list of QConfigs"):
        quantizer.amp(model, candidates=config)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="expected a number, got 'x'"):
        quantizer.allocate(amp_model, bits_per_weight="x")  # type: ignore[arg-type]
