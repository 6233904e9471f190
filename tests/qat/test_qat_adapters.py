"""Low-rank adapters in float beside weights of 4 bits that stay (Dettmers et al. 2023, QLoRA)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import torch_quant
from torch_quant import Quantizer, recipes

pytestmark = pytest.mark.usefixtures("grad")

IDS = torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(0))


class Adapted(nn.Module):
    """``W x + s B A x`` with ``W`` frozen (Hu et al. 2021), as PEFT writes it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))
        return y


def decoder() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, Adapted(getattr(layer.self_attn, name)))
    return model.eval()


@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_adapters_learn_and_everything_else_stays(backend: str, tmp_path: Path) -> None:
    model = decoder()
    quantizer = Quantizer(
        recipes.int4_weight_only(group_size=32), backend=backend, overrides={"re:.*lora_.*": None}
    )
    qat_model = quantizer.qat(model, example_inputs={"input_ids": IDS})
    optimizer = torch.optim.AdamW(quantizer.parameter_groups(qat_model, lr=1e-2, scale_lr=0.0))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    losses = []
    for _ in range(12):
        loss = qat_model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {name for name in before if "lora_" in name}

    with torch.no_grad():
        quant_model = quantizer.quantize(qat_model.eval())
        expected, found = (each(input_ids=IDS).logits for each in (qat_model, quant_model))
        torch_quant.save(quant_model, tmp_path)
        loaded = torch_quant.load(tmp_path, decoder())
        assert torch.equal(loaded(input_ids=IDS).logits, found)
    if backend == "reference":
        assert torch.equal(found, expected)
    assert float(torch_quant.sqnr(expected, found)) > 30
    adapted = quant_model.get_submodule("model.layers.0.self_attn.q_proj")
    assert torch.equal(adapted.lora_A.weight, model.state_dict()[
        "model.layers.0.self_attn.q_proj.lora_A.weight"])  # fmt: skip
    assert "int4 weights" in repr(adapted.base_layer)
