"""Mixtures of experts whose weights are one tensor: quantized as any linear layer is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from torch_quant import Quantizer, load, recipes, save
from torch_quant.core.metrics import sqnr
from torch_quant.ops.experts import GROUPED_LINEAR

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def moe(kind: str, layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    every = {**SIZES, "num_hidden_layers": layers}
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**every)).eval()
    if kind == "qwen3":
        sizes = {k: v for k, v in every.items() if k != "num_local_experts"}
        config = Qwen3MoeConfig(num_experts=4, moe_intermediate_size=32, head_dim=8, **sizes)
        return Qwen3MoeForCausalLM(config).eval()
    return GptOssForCausalLM(GptOssConfig(head_dim=8, sliding_window=8, **every)).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.thin
@pytest.mark.parametrize("capture", ["modules", "whole"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
def test_experts_are_quantized(kind: str, capture: str) -> None:
    model, x = moe(kind), tokens(2, 12)
    quantizer = Quantizer(
        "reference", qconfig=recipes.int8_weight_only(group_size=16), capture=capture
    )
    quant_model = quantizer.quantize(model, example_inputs={"input_ids": x})
    plan = quant_model.quantization.plan
    experts = [site for site in plan.values() if site.op == "grouped_linear"]
    assert len(experts) == 2
    assert all(site.quantized for site in experts)
    assert plan.coverage > 0.9  # all but attention's products
    for batch in (x, tokens(3, 7), tokens(1, 1)):
        with torch.no_grad():
            assert sqnr(model(batch).logits, quant_model(batch).logits) > 35  # 8 bits
    held = quant_model.state_dict()["model.layers.0.mlp.experts.down_proj"]
    assert held.dtype == torch.int8


def test_the_operator_is_the_sum_over_each_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 6, generator=generator)
    weight = torch.randn(3, 5, 6, generator=generator)
    for ends in ([4, 4, 9], [0, 0, 10], [10, 10, 10], [0, 0, 0], [2, 5, 8]):
        found = GROUPED_LINEAR(x, weight.reshape(15, 6), torch.tensor(ends, dtype=torch.int32))
        starts = [0, *ends[:-1]]
        rows = [x[a:b] @ w.T for a, b, w in zip(starts, ends, weight, strict=True)]
        rows.append(torch.zeros(10 - ends[-1], 5))
        torch.testing.assert_close(found, torch.cat(rows))
    torch.library.opcheck(
        GROUPED_LINEAR, (x, weight.reshape(15, 6), torch.tensor([4, 4, 9])), test_utils=_CHECKS
    )


_CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.thin
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
def test_experts_on_kernels(kind: str, symmetric: bool, tmp_path: Path) -> None:
    """Their noise beside REFERENCE's is that of activations in 8 bits, far below the weights'."""
    model, x = moe(kind), tokens(2, 12)
    recipe = recipes.int4_weight_only(group_size=32, symmetric=symmetric)
    made = [
        Quantizer(recipe, backend=backend).quantize(model, example_inputs={"input_ids": x})
        for backend in ("onednn", "reference")
    ]
    experts = [site for site in made[0].quantization.plan.values() if site.op == "grouped_linear"]
    assert [site.quantized for site in experts] == [True] * 2
    assert made[0].state_dict()["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.uint8
    with torch.no_grad():
        for batch in (x, tokens(3, 7), tokens(1, 1)):
            ours, theirs = (each(batch).logits for each in made)
            assert sqnr(theirs, ours) > 25
    save(made[0], tmp_path / "moe")
    loaded = load(tmp_path / "moe", model=moe(kind))
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, made[0](x).logits)


def test_a_backend_without_a_kernel_says_so_and_is_right() -> None:
    model, x = moe("mixtral"), tokens(2, 12)
    quantizer = Quantizer("onnx", capture="whole")
    quantizer.calib(model)(x)
    coverage = quantizer.coverage(model)
    assert "grouped_linear" in str(coverage)
    reason = coverage.reasons["model.layers.0.mlp.experts.grouped_linear"]
    assert "no int8 kernel for grouped_linear" in reason
    with torch.no_grad():
        assert sqnr(model(x).logits, quantizer.quantize(model)(x).logits) > 15


def test_saved_and_calibrated(tmp_path: Path) -> None:
    """Static int8, a calib proxy that is bit-equal, and a folder."""
    model, x = moe("mixtral"), tokens(2, 12)
    quantizer = Quantizer("reference")
    with torch.no_grad():
        assert torch.equal(quantizer.calib(model)(x).logits, model(x).logits)
        quant_model = quantizer.quantize(model)
        expected = quant_model(x).logits
        save(quant_model, tmp_path / "moe")
        assert torch.equal(load(tmp_path / "moe", model=moe("mixtral"))(x).logits, expected)
        assert sqnr(model(x).logits, expected) > 15


def gates(plan: Any) -> list[Any]:
    return [site for site in plan.values() if site.op == "linear" and "experts" in site.reason]


@pytest.mark.thin
@pytest.mark.parametrize("recipe", ["int4", "int8", "dynamic"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
def test_what_picks_experts_stays_in_float(kind: str, recipe: str) -> None:
    config = {
        "int4": recipes.int4_weight_only(group_size=32),
        "int8": recipes.int8_weight_only(),
        "dynamic": recipes.int8_dynamic(),
    }[recipe]
    model, x = moe(kind), tokens(2, 12)
    quantizer = Quantizer(config, backend="reference")
    quant_model = quantizer.quantize(model, example_inputs={"input_ids": x})
    found = gates(quantizer.plan)
    assert [site.quantized for site in found] == [False]
    router = getattr(model.model.layers[0].mlp, "gate", None) or model.model.layers[0].mlp.router
    name = found[0].name
    assert model.get_submodule(name) is router
    held = quant_model.state_dict()[f"{name}.weight"]
    assert torch.equal(held, router.weight)
    assert "it picks experts" in str(quantizer.coverage(model))


@pytest.mark.parametrize("key", ["model.layers.0.mlp.gate", "*.gate", "op:linear"])
def test_an_override_quantizes_what_picks_experts(key: str) -> None:
    config = recipes.int8_weight_only()
    quantizer = Quantizer(config, backend="reference", overrides={key: config})
    quantizer.quantize(moe("mixtral"), example_inputs={"input_ids": tokens(2, 12)})
    assert quantizer.plan["model.layers.0.mlp.gate"].quantized


def by_topk(shares: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = shares.topk(2)
    return weights, chosen


def by_the_largest(shares: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = shares.max(dim=-1, keepdim=True)
    return weights, chosen


def by_sorting(shares: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = (shares + 0.01).sort(-1, descending=True)
    return weights[:, :2], chosen[:, :2]


def by_argmax(shares: Tensor) -> tuple[Tensor, Tensor]:
    chosen = shares.argmax(-1, keepdim=True)
    return shares.gather(-1, chosen), chosen


class Listed(nn.Module):
    """Experts that are modules of a list, which Python code calls one by one."""

    def __init__(self, pick: Any = by_topk) -> None:
        super().__init__()
        self.pick, self.gate = pick, nn.Linear(16, 3, bias=False)
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.pick(self.gate(x).softmax(-1))
        found = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, place = (chosen == i).nonzero(as_tuple=True)
            found[rows] += expert(x[rows]) * weights[rows, place, None]
        return found


class AtOnce(Listed):
    """The same, with every expert computed for every row: it is one graph."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.pick(self.gate(x).softmax(-1))
        found = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            found = found + expert(x) * ((chosen == i) * weights).sum(-1, keepdim=True)
        return found


def in_float(model: nn.Module, capture: str) -> list[str]:
    torch.manual_seed(0)
    quantizer = Quantizer(recipes.int8_weight_only(), backend="reference", capture=capture)
    quantizer.quantize(model.eval(), example_inputs=torch.randn(8, 16))
    return [site.name for site in quantizer.plan.values() if not site.quantized]


@pytest.mark.thin
@pytest.mark.parametrize("pick", [by_topk, by_the_largest, by_sorting, by_argmax])
@pytest.mark.parametrize("capture", ["modules", "whole"])
@pytest.mark.parametrize("kind", [Listed, AtOnce])
def test_experts_in_a_list(kind: Any, capture: str, pick: Any) -> None:
    assert in_float(kind(pick), capture) == ["gate"]  # the mixture is the model
    assert in_float(nn.Sequential(nn.Linear(16, 16), kind(pick)), capture) == ["1.gate"]


class Heads(nn.Module):
    """As many numbers as there are layers, by which nothing is picked."""

    def __init__(self) -> None:
        super().__init__()
        self.moe, self.blocks = Listed(), nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.boxes, self.classes = nn.Linear(16, 4), nn.Linear(16, 7)
        self.conv = nn.Conv1d(4, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.moe(x)
        for block in self.blocks:
            x = x + block(x).relu()
        best = self.classes(x).max(-1).values.topk(2).indices
        return self.boxes(x).sigmoid()[best]


@pytest.mark.parametrize("capture", ["modules", "whole"])
def test_heads_beside_as_many_layers_pick_nothing(capture: str) -> None:
    assert in_float(Heads(), capture) == ["moe.gate"]
    assert in_float(nn.Sequential(Heads()), capture) == ["0.moe.gate"]
