"""Small language models, quantized by weights alone, for tests of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import tokens
from torch import Tensor, nn

from torch_quant import Quantizer, recipes
from torch_quant.convert.codes import quantized_weights

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def _decoder(name: str, **options: Any) -> Callable[..., nn.Module]:
    def build(**others: Any) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES | options | others)
        model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms that differ from 0 and 1
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model

    return build


DECODERS = {
    "llama": _decoder("Llama", tie_word_embeddings=False),
    "qwen2": _decoder("Qwen2", tie_word_embeddings=False),
    "tied": _decoder("Llama", tie_word_embeddings=True),
}

IN_FLOAT = {"op:embedding": None}


def ids(batch: int = 2, length: int = 7) -> dict[str, Tensor]:
    return {"input_ids": tokens(batch, length, SIZES["vocab_size"])}


def quantized(model: nn.Module, qconfig: Any = None, **options: Any) -> Any:
    """int4 in groups of 32 by default, embeddings in float."""
    options = {"overrides": IN_FLOAT, "capture": "modules", "backend": "reference", **options}
    qconfig = qconfig or recipes.int4_weight_only(group_size=32)
    return Quantizer(qconfig=qconfig, **options).quantize(model, example_inputs=ids())


def integers(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Codes, scale and zero point of each quantized weight."""
    found = quantized_weights(model).items()
    return {name: (each.codes, each.scale, each.zero_point) for name, each in found}


def same_integers(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = integers(first), integers(second)
    return ours.keys() == theirs.keys() and all(
        all(torch.equal(x, y) for x, y in zip(ours[name], theirs[name], strict=True))
        for name in ours
    )
