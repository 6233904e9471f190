"""The whole way of a language model, twice: rounded with data, saved, written, read, writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_models import IN_FLOAT, SIZES, ids
from thinning import third
from torch import Tensor

import torch_quant
from torch_quant import (
    AWQ,
    FLOAT,
    GPTQ,
    TEQ,
    AutoRound,
    PerGroup,
    QConfig,
    Quantizer,
    QuantSpec,
    export_checkpoint,
    load_checkpoint,
)


def mistral() -> Any:
    """Tied, and with a window of attention that is shorter than the text."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES, sliding_window=4, tie_word_embeddings=True)
    return transformers.MistralForCausalLM(config).eval()


def written(model: Any) -> Tensor:
    found: Tensor = model.generate(**ids(1, 5), max_new_tokens=6, do_sample=False)
    return found


WAYS: dict[str, tuple[str, QConfig]] = {
    "gptq": ("gptq", QConfig(FLOAT, method=GPTQ(full_range=True))),
    "match_float": (
        "compressed-tensors",
        QConfig(FLOAT, method=GPTQ(match_float=True, sequential=True)),
    ),
    "awq": ("compressed-tensors", QConfig(FLOAT, transforms=[AWQ()])),
    "teq-autoround": (
        "gptq",
        QConfig(FLOAT, method=AutoRound(iterations=2), transforms=[TEQ(iterations=2)]),
    ),
}


@pytest.mark.parametrize("way", third(WAYS, 0))
def test_twice(way: str, tmp_path: Path) -> None:
    layout, config = WAYS[way]
    model, x = mistral(), ids(2, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spec = QuantSpec.of("int4", granularity=PerGroup(32))
    qconfig = QConfig(FLOAT, spec, method=config.method, transforms=config.transforms)
    overrides = {**IN_FLOAT, "lm_head": None}

    def quantizer() -> Quantizer:
        return Quantizer("reference", qconfig=qconfig, overrides=overrides, capture="modules")

    first, texts, others = quantizer(), [ids(2, 12), ids(1, 9)], [ids(3, 10)]
    kept: list[tuple[Any, Tensor, Tensor]] = []
    for turn, batches in enumerate((texts, others)):
        first.round_weights(model, batches, progress=False)
        quant_model: Any = first.quantize(model)
        logits, text = quant_model(**x).logits, written(quant_model)
        (folder := tmp_path / str(turn)).mkdir()
        torch_quant.save(quant_model, folder / "saved")
        with torch.device("meta"):
            empty: Any = type(model)(model.config)
        empty.generation_config = model.generation_config
        loaded: Any = torch_quant.load(folder / "saved", model=empty)
        assert torch.equal(written(loaded), text)
        read: Any = load_checkpoint(
            export_checkpoint(loaded, folder / "written", layout), backend="reference"
        )
        assert torch.equal(read(**x).logits, logits)
        assert torch.equal(written(read), text)
        again: Any = load_checkpoint(
            export_checkpoint(read, folder / "again", layout), backend="reference"
        )
        assert torch.equal(again(**x).logits, logits)
        kept.append((quant_model, logits, text))
    for quant_model, logits, text in kept:  # what came later has left them alone
        assert torch.equal(quant_model(**x).logits, logits)
        assert torch.equal(written(quant_model), text)
    fresh = quantizer()
    fresh.round_weights(model, others, progress=False)
    assert torch.equal(fresh.quantize(model)(**x).logits, kept[1][1])
    assert not torch.equal(kept[0][1], kept[1][1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
