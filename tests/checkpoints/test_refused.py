"""What cannot be written or read: the error names file, tensor, what was expected and what came."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import DECODERS, IN_FLOAT, ids, quantized
from safetensors.torch import load_file, save_file
from torch import nn

from torch_quant import (
    FLOAT,
    InvalidConfig,
    PerBlock,
    QConfig,
    Quantizer,
    QuantSpec,
    export_checkpoint,
    load_checkpoint,
    recipes,
)

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def quant_model() -> Any:
    with torch.no_grad():
        return quantized(DECODERS["llama"]())


@pytest.fixture
def folder(quant_model: Any, tmp_path: Path) -> Path:
    return export_checkpoint(quant_model, tmp_path / "model")


def edited(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change what ``quantization_config`` says."""
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def rewritten(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder: Path, *parts: str, **options: Any) -> None:
    with pytest.raises(InvalidConfig) as raised:
        load_checkpoint(folder, backend="reference", **options)
    for part in parts:
        assert part in str(raised.value)


# Writing


@pytest.mark.parametrize(
    ("qconfig", "reason"),
    [
        (recipes.int4_weight_only(symmetric=False, group_size=32), "signed codes with zero at 0"),
        (QConfig(FLOAT, QuantSpec.of("float8_e4m3fn", per_channel=True)), "integers of 2, 4, 8"),
        (
            QConfig(FLOAT, QuantSpec.of(bits=3, signed=True, symmetric=True, per_channel=True)),
            "integers of 2, 4, 8 bits, not s3",
        ),
        (QConfig(FLOAT, QuantSpec.of("int8", granularity=PerBlock((8, 8)))), "group of inputs"),
        (QConfig(FLOAT, QuantSpec.of("int8")), "output channel or group"),
        (
            replace(recipes.int8_dynamic(), weight=QuantSpec.of("int4", per_channel=True)),
            "float activations, or for dynamic ones of 8 bits per token",
        ),
    ],
    ids=["affine", "float8", "three-bits", "blocks", "whole", "dynamic"],
)
def test_formats_that_the_layout_cannot_hold(qconfig: QConfig, reason: str, tmp_path: Path) -> None:
    model = quantized(DECODERS["llama"](), qconfig)
    with pytest.raises(InvalidConfig, match=reason) as raised:
        export_checkpoint(model, tmp_path / "model")
    assert f"{QUERY} cannot be written as compressed-tensors" in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gguf"}, "format='gguf'.*expected 'compressed-tensors'"),
        ({"dtype": torch.float64}, "dtype=torch.float64"),
    ],
)
def test_options(quant_model: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=message):
        export_checkpoint(quant_model, tmp_path / "model", **options)


def test_a_model_that_is_none_of_transformers(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.ones(2, 8)
    quantizer = Quantizer("reference", qconfig=recipes.int8_weight_only())
    with pytest.raises(InvalidConfig, match=r"no configuration of transformers.*torch_quant\.save"):
        export_checkpoint(quantizer.quantize(model, example_inputs=x), tmp_path / "model")
    with pytest.raises(InvalidConfig, match="expected the model that quantizer"):
        export_checkpoint(model, tmp_path / "model")


def test_a_layer_of_another_class(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    model = quantized(transformers.GPT2LMHeadModel(config).eval())
    with pytest.raises(InvalidConfig, match=r"weights of nn\.Linear, and this is Conv1D"):
        export_checkpoint(model, tmp_path / "model")


def test_a_layer_that_computes_with_more(tmp_path: Path) -> None:
    asked = recipes.int4_weight_only(group_size=32).to_dict() | {"transforms": ["smoothquant"]}
    model = DECODERS["llama"]()
    quantizer = Quantizer(QConfig.from_dict(asked), backend="reference", overrides=IN_FLOAT)
    quantizer.calib(model)(**ids())
    with pytest.raises(InvalidConfig, match=r"q_proj\.smooth_inverse, which smoothquant\(alpha"):
        export_checkpoint(quantizer.quantize(model), tmp_path / "model")


def test_nothing_quantized(tmp_path: Path) -> None:
    model = quantized(DECODERS["llama"](), overrides={"op:linear": None})
    with pytest.raises(InvalidConfig, match="no linear layer of the model is quantized"):
        export_checkpoint(model, tmp_path / "model")


def test_a_folder_in_use_is_left_alone(quant_model: Any, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for target in (tmp_path, tmp_path / "notes"):
        with pytest.raises(InvalidConfig, match="exists already"):
            export_checkpoint(quant_model, target)
    with pytest.raises(InvalidConfig, match=r"there is no folder .*a; mkdir -p "):
        export_checkpoint(quant_model, tmp_path / "a" / "b")
    assert [each.name for each in tmp_path.iterdir()] == ["notes"]
    (tmp_path / "empty").mkdir()
    assert (export_checkpoint(quant_model, tmp_path / "empty") / "config.json").is_file()


class Tokenizer:
    """Saves itself, or runs out of space on the way."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")
        if self.fails:
            raise OSError("no space left")


def test_whole_or_not_at_all(quant_model: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no space left"):
        export_checkpoint(quant_model, tmp_path / "model", tokenizer=Tokenizer(fails=True))
    assert not list(tmp_path.iterdir())
    export_checkpoint(quant_model, tmp_path / "model", tokenizer=Tokenizer(fails=False))
    assert sorted(each.name for each in (tmp_path / "model").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


# Reading


def test_truncated_files(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(folder, "model.safetensors is truncated or no safetensors file")
    file.write_bytes(whole)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[:-20])
    refused(folder, "config.json is truncated or no JSON")


def test_files_that_are_not_there(folder: Path) -> None:
    refused(folder.parent / "nowhere", "cannot read", "nowhere/config.json")
    (folder / "model.safetensors").unlink()
    refused(folder, "there is no", "model.safetensors", "not from pickles")


@pytest.mark.parametrize("ending", ["weight_scale", "weight_shape"])
def test_a_missing_tensor_of_a_layer(folder: Path, ending: str) -> None:
    rewritten(folder, lambda tensors: tensors.pop(f"{QUERY}.{ending}"))
    refused(folder, f"lacks the tensor {QUERY}.{ending}")


def test_a_missing_layer_and_one_too_many(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.pop("model.norm.weight"))
    refused(folder, "another model", "LlamaForCausalLM it lacks model.norm.weight")
    rewritten(folder, lambda tensors: tensors.update({"model.extra": torch.ones(2)}))
    refused(folder, "lacks model.norm.weight and has beside its tensors model.extra")


@pytest.mark.parametrize(
    ("ending", "value", "expected"),
    [
        ("weight_packed", torch.zeros(64, 7, dtype=torch.int32), "(64, 8) of I32"),
        ("weight_packed", torch.zeros(64, 8, dtype=torch.int64), "(64, 8) of I32"),
        ("weight_scale", torch.zeros(64, 3), "(64, 2) of F32 or F16 or BF16"),
    ],
)
def test_wrong_tensors(folder: Path, ending: str, value: torch.Tensor, expected: str) -> None:
    rewritten(folder, lambda tensors: tensors.update({f"{QUERY}.{ending}": value}))
    shape = str(tuple(value.shape))
    refused(
        folder, "model.safetensors: the tensor", f"{QUERY}.{ending} has shape {shape}", expected
    )


def test_a_float_tensor_of_another_shape(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}))
    refused(folder, "the tensor model.norm.weight has shape (32,) of F32; expected (64,)")


def test_another_model(folder: Path) -> None:
    import transformers

    options = {**DECODERS["llama"]().config.to_dict(), "intermediate_size": 96}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    refused(folder, "mlp.down_proj has shape (64, 128)", "has (64, 96) there", model=other)
    refused(folder, "another model", "an nn.Linear", model=nn.Linear(4, 2))
    refused(folder, "expected a float nn.Module", model=object())


def test_a_model_on_the_meta_device_without_its_buffers(folder: Path) -> None:
    with torch.device("meta"):
        model = DECODERS["llama"]().__class__(DECODERS["llama"]().config)
    refused(folder, "inv_freq", "made on the CPU", model=model)


@pytest.mark.parametrize(
    ("entry", "value", "expected"),
    [
        ("quant_method", "awq", "quant_method 'awq'; expected 'compressed-tensors'"),
        ("config_groups", {}, "expected schemes by name"),
        ("config_groups", {"a": {"targets": ["Conv2d"], "weights": {}}}, "one that targets"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme {'num_bits': 8}; expected none"),
    ],
)  # fmt: skip
def test_unknown_settings(folder: Path, entry: str, value: Any, expected: str) -> None:
    edited(folder, lambda about: about.update({entry: value}))
    refused(folder, "config.json: quantization_config has", expected)


@pytest.mark.parametrize(
    ("entry", "value", "expected"),
    [
        ("num_bits", 3, "'3 bits of type int'; expected integers of 2, 4, 8 bits"),
        ("type", "float", "4 bits of type float"),
        ("strategy", "block", "the strategy 'block'; expected group or channel"),
        ("group_size", 48, "48"),
    ],
)
def test_unknown_schemes(folder: Path, entry: str, value: Any, expected: str) -> None:
    def edit(about: dict[str, Any]) -> None:
        about["config_groups"]["group_0"]["weights"][entry] = value

    edited(folder, edit)
    refused(folder, expected)


def test_quantized_activations_and_groups_out_of_order(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update({f"{QUERY}.weight_g_idx": torch.zeros(64)}))
    refused(folder, QUERY, "by activation order")

    def edit(about: dict[str, Any]) -> None:
        about["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}

    edited(folder, edit)
    refused(folder, "input_activations {'num_bits': 8}; expected none, or dynamic ones of 8 bits")


def test_a_float_checkpoint(folder: Path) -> None:
    model = DECODERS["llama"]()
    model.save_pretrained(folder.parent / "float")  # type: ignore[operator]
    refused(folder.parent / "float", "config.json has no quantization_config")


def test_an_index_that_lies(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../y"}}')
    refused(folder, "index.json names '../../y', which is not in its folder")
    index = {"weight_map": {"model.norm.weights": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model.safetensors lacks the tensor model.norm.weights")


def test_the_checkpoint_may_go(folder: Path) -> None:
    """Layers serve tensors of any rank, so nothing is captured of the float model any more."""
    again = load_checkpoint(folder, backend="reference")
    expected = again(**ids()).logits
    shutil.rmtree(folder)
    assert torch.equal(again(**ids()).logits, expected)
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(again.lm_head(x[0, 0]), again.lm_head(x)[0, 0])


@pytest.mark.parametrize(
    ("name", "value"),
    [("architectures", ["Trainer"]), ("architectures", {"a": 1}), ("num_attention_heads", 0)],
)
def test_configurations_that_make_no_model(folder: Path, name: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(InvalidConfig, match=r"config\.json"):
        load_checkpoint(folder, backend="reference")


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_code_that_a_configuration_names_is_not_fetched(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: "somebody/kernel"}))
    model = load_checkpoint(folder, backend="reference")
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_float_zero_points_are_not_written(format: str, tmp_path: Path) -> None:
    config = recipes.int4_weight_only(group_size=32, symmetric=False, float_zero_points=True)
    with torch.no_grad():
        made = quantized(DECODERS["llama"](), config)
    with pytest.raises(InvalidConfig, match="zero points that are codes, not u4 affine"):
        export_checkpoint(made, tmp_path / "model", format=format)
