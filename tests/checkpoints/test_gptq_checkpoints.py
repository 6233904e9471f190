"""Folders in the GPTQ layout: the same integers and outputs, and words as its definition says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import DECODERS, IN_FLOAT, ids, quantized, same_integers
from safetensors.torch import load_file, save_file
from torch import Tensor

from torch_quant import (
    FLOAT,
    InvalidConfig,
    PerGroup,
    QConfig,
    QuantSpec,
    export_checkpoint,
    load_checkpoint,
    recipes,
)
from torch_quant.convert.codes import quantized_weights

QUERY = "model.layers.0.self_attn.q_proj"


def weights(bits: int, group: int | None, *, signed: bool = True) -> QConfig:
    spec = QuantSpec.of(
        bits=bits, signed=signed, symmetric=signed, per_channel=group is None,
        granularity=None if group is None else PerGroup(group),
    )  # fmt: skip
    return QConfig(FLOAT, spec)


def exported(folder: Path, qconfig: QConfig | None = None, **options: Any) -> Any:
    quant_model = quantized(DECODERS["qwen2"](), qconfig, **options)
    export_checkpoint(quant_model, folder, format="gptq")
    return quant_model


def by_definition(tensors: dict[str, Tensor], module: str, bits: int) -> Tensor:
    """The weight ``[out, in]``, code by code with Python's integers."""
    qweight, qzeros, scales, g_idx = (
        tensors[f"{module}.{each}"] for each in ("qweight", "qzeros", "scales", "g_idx")
    )

    def code(words: list[int], i: int) -> int:
        stream = sum((word & 0xFFFFFFFF) << (32 * k) for k, word in enumerate(words))
        return (stream >> (bits * i)) & (2**bits - 1)

    columns, rows = qweight.t().tolist(), qzeros.tolist()
    found = torch.empty(len(columns), len(g_idx))
    for n, words in enumerate(columns):
        for k, group in enumerate(g_idx.tolist()):
            zero = code(rows[group], n) + 1
            found[n, k] = (code(words, k) - zero) * scales[group, n]
    return found


@pytest.mark.parametrize(
    "qconfig",
    [
        weights(4, 32), weights(4, None), weights(8, 64), weights(2, 16), weights(3, 32),
        weights(4, 32, signed=False), weights(8, None, signed=False),
    ],
    ids=["int4", "int4-channel", "int8", "int2", "int3", "uint4", "uint8-channel"],
)  # fmt: skip
def test_the_same_integers_outputs_and_definition(qconfig: QConfig, tmp_path: Path) -> None:
    quant_model = exported(tmp_path / "model", qconfig)
    again = load_checkpoint(tmp_path / "model", backend="reference")
    assert same_integers(again, quant_model)
    assert torch.equal(again(**ids()).logits, quant_model(**ids()).logits)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    weight = quantized_weights(quant_model)[QUERY]
    found = by_definition(tensors, QUERY, weight.spec.bits)
    assert torch.equal(found, weight.values())


def test_what_the_configuration_says(tmp_path: Path) -> None:
    overrides = {**IN_FLOAT, "lm_head": None, "*.down_proj": recipes.int8_weight_only()}
    quant_model = exported(tmp_path / "model", overrides=overrides)
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    expected = {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
        "checkpoint_format": "gptq", "lm_head": False,
    }  # fmt: skip
    assert expected.items() <= config.items()
    assert config["dynamic"] == {
        "-:^lm_head$": {},
        r"+:^model\.layers\.0\.mlp\.down_proj$": {"bits": 8, "group_size": -1, "sym": True},
    }
    again = load_checkpoint(tmp_path / "model", backend="reference")
    assert same_integers(again, quant_model)
    assert torch.equal(again(**ids()).logits, quant_model(**ids()).logits)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert set(tensors[f"{QUERY}.qzeros"].flatten().tolist()) == {0x77777777}


def test_both_layouts_hold_the_same(tmp_path: Path) -> None:
    quant_model = exported(tmp_path / "gptq")
    export_checkpoint(quant_model, tmp_path / "packed")
    first, second = (
        load_checkpoint(tmp_path / name, backend="reference") for name in ("gptq", "packed")
    )
    assert same_integers(first, second)


def test_version_2(tmp_path: Path) -> None:
    """Zero points as they are."""
    quant_model = exported(tmp_path / "model", weights(4, 32, signed=False))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    for name, x in tensors.items():
        if name.endswith("qzeros"):
            tensors[name] = x + 0x11111111  # none is 15, so nothing is carried over
    save_file(tensors, file)
    again = load_checkpoint(tmp_path / "model", backend="reference")
    assert same_integers(again, quant_model)


@pytest.mark.parametrize("zeros", [True, False])
def test_what_other_tools_write_beside(zeros: bool, tmp_path: Path) -> None:
    """Biases of layers without one, and buffers that are computed."""
    quant_model = exported(tmp_path / "model")
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.0.mlp.down_proj.bias"
    bias = torch.zeros(64) if zeros else torch.linspace(-1, 1, 64)
    beside = {name: bias.to(torch.float16), "model.rotary_emb.inv_freq": torch.ones(8)}
    save_file(load_file(file) | beside, file)
    again = load_checkpoint(tmp_path / "model", backend="reference")
    x = torch.randn(1, 3, 128)
    first, second = (each.model.layers[0].mlp.down_proj(x) for each in (again, quant_model))
    # The kernel adds the bias to its sums before it rounds them, once more than without.
    torch.testing.assert_close(first, second + beside[name], rtol=1e-5, atol=1e-5)
    if zeros:
        assert torch.equal(again(**ids()).logits, quant_model(**ids()).logits)


def test_formats_that_the_layout_cannot_hold(tmp_path: Path) -> None:
    model = quantized(DECODERS["qwen2"](), weights(6, 32))
    with pytest.raises(InvalidConfig, match=r"cannot be written as gptq.*2, 3, 4, 8 bits, not s6"):
        export_checkpoint(model, tmp_path / "model", format="gptq")
    model = DECODERS["qwen2"]()
    model.model.layers[0].self_attn.q_proj.weight.data.abs_()  # type: ignore[union-attr]
    quant_model = quantized(model, weights(4, 32, signed=False))
    with pytest.raises(InvalidConfig, match=f"{QUERY} cannot be .* no zero point of 0"):
        export_checkpoint(quant_model, tmp_path / "model", format="gptq")


def test_layers_that_fill_no_word(tmp_path: Path) -> None:
    import transformers

    config = transformers.Qwen2Config(**{**DECODERS["qwen2"]().config.to_dict(), "vocab_size": 100})
    quant_model = quantized(transformers.Qwen2ForCausalLM(config).eval())
    with pytest.raises(InvalidConfig, match=r"lm_head cannot be .* 100 codes of 4 do not"):
        export_checkpoint(quant_model, tmp_path / "model", format="gptq")


def _swap(x: Tensor) -> Tensor:
    return x.flip(0).contiguous()


@pytest.mark.parametrize(
    ("ending", "edit", "message"),
    [
        ("g_idx", _swap, "by activation order"),
        ("scales", lambda x: x[:1].contiguous(), r"scales has shape \(1, 64\).*\(2, 64\)"),
        ("qzeros", lambda x: x.to(torch.int64), "qzeros has shape .* of I64; expected .* I32"),
        ("qweight", lambda x: x[:7].contiguous(), "multiple of 32"),
        ("qzeros", None, f"lacks the tensor {QUERY}.qzeros"),
    ],
    ids=["order", "scales", "zeros", "weight", "missing"],
)
def test_damaged_tensors(
    ending: str, edit: Callable[[Tensor], Tensor] | None, message: str, tmp_path: Path
) -> None:
    exported(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    if edit is None:
        del tensors[f"{QUERY}.{ending}"]
    else:
        tensors[f"{QUERY}.{ending}"] = edit(tensors[f"{QUERY}.{ending}"])
    save_file(tensors, file)
    with pytest.raises(InvalidConfig, match=message):
        load_checkpoint(tmp_path / "model", backend="reference")


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("checkpoint_format", "marlin", "'marlin'; expected 'gptq' or 'gptq_v2'"),
        ("bits", 5, "bits 5; expected 2 or 3 or 4 or 8"),
        ("group_size", 0, "group_size 0; expected a size"),
    ],
)
def test_unknown_settings(entry: str, value: Any, message: str, tmp_path: Path) -> None:
    exported(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"][entry] = value
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidConfig, match=message):
        load_checkpoint(tmp_path / "model", backend="reference")
