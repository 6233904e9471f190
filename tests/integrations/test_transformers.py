"""transformers loads, quantizes and saves with this package, by its own functions."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import DECODERS, IN_FLOAT, SIZES, ids, quantized
from safetensors.torch import load_file, save_file
from thinning import rarely

from torch_quant import (
    FLOAT,
    InvalidConfig,
    QConfig,
    Quantizer,
    QuantSpec,
    export_checkpoint,
    load_checkpoint,
    native,
)
from torch_quant.convert.quick import QuickCall

transformers = pytest.importorskip(
    "transformers", reason="transformers is missing: pip install 'transformers>=5'"
)
from torch_quant.integrations.transformers import TorchQuantConfig  # noqa: E402


def from_pretrained(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def floats(folder: Path, name: str = "llama") -> Any:
    """A float model and where it is saved."""
    model: Any = DECODERS[name]()
    model.save_pretrained(folder)
    return model


def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(**ids(3, 9)).logits
    return found


@pytest.mark.parametrize("backend", ["reference", "onednn"])
@pytest.mark.parametrize("name", DECODERS)
def test_quantized_while_loading_saved_and_loaded(name: str, backend: str, tmp_path: Path) -> None:
    model = floats(tmp_path / "float", name)
    config = TorchQuantConfig("int4_weight_only", group_size=32, backend=backend)
    quant_model = from_pretrained(tmp_path / "float", quantization_config=config)
    quantizer = Quantizer(config.qconfig, backend=backend, overrides=IN_FLOAT)
    expected = logits(quantizer.quantize(model, example_inputs=ids()))
    assert torch.equal(logits(quant_model), expected)
    assert type(quant_model) is type(model)
    forwards = [vars(each).get("_compiled_call_impl") for each in quant_model.modules()]
    here = backend == "onednn" and native.unavailable() is None
    assert any(isinstance(each, QuickCall) for each in forwards) == here
    quant_model.save_pretrained(tmp_path / "int4")
    again = from_pretrained(tmp_path / "int4")
    assert torch.equal(logits(again), expected)
    assert torch.equal(
        again.generate(**ids(1, 5), max_new_tokens=6, do_sample=False),
        quant_model.generate(**ids(1, 5), max_new_tokens=6, do_sample=False),
    )
    again.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "int4" / file).read_bytes()
    for copied in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(logits(copied), expected)
    alone = load_checkpoint(tmp_path / "int4", backend=backend)
    assert torch.equal(logits(alone), expected)
    x = torch.randn(2, 3, SIZES["hidden_size"])
    layer = quant_model.model.layers[0].mlp.up_proj  # of a rank that it was not captured for
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


def test_a_smaller_file_that_says_how(tmp_path: Path) -> None:
    floats(tmp_path / "float")
    config = TorchQuantConfig("int8_weight_only", modules_to_not_convert=["lm_head"])
    quant_model = from_pretrained(tmp_path / "float", quantization_config=config)
    quant_model.save_pretrained(tmp_path / "int8")
    about = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert about["quant_method"] == "torch_quant"
    assert about["recipe"] == "int8_weight_only"
    assert about["ignore"] == ["lm_head"]
    tensors = load_file(tmp_path / "int8" / "model.safetensors")
    assert "lm_head.weight" in tensors
    assert tensors["model.layers.0.mlp.up_proj.weight_packed"].shape == (128, 16)
    assert torch.equal(logits(from_pretrained(tmp_path / "int8")), logits(quant_model))


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec.of(bits=4, per_channel=True),
        QuantSpec.of(bits=3, signed=True, symmetric=True, per_channel=True),
        QuantSpec.of(bits=6, per_channel=True),
    ],
    ids=["uint4", "int3", "uint6"],
)
def test_formats_that_only_this_package_reads(spec: QuantSpec, tmp_path: Path) -> None:
    quant_model = quantized(DECODERS["tied"](), QConfig(FLOAT, spec))
    folder = export_checkpoint(quant_model, tmp_path / "model", format="torch_quant")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["backend"] = "reference"
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(from_pretrained(folder)), logits(quant_model))
    assert torch.equal(logits(load_checkpoint(folder, backend="reference")), logits(quant_model))


def test_groups_that_the_backend_has_no_kernel_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """oneDNN wants a multiple of 32 inputs: the integers are dequantized, and the logs say so."""
    model = floats(tmp_path / "float")
    spec = quantized(model, TorchQuantConfig(group_size=16).qconfig)
    folder = export_checkpoint(spec, tmp_path / "int4", format="torch_quant")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["backend"] = "onednn"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="multiple of 32"):
        from_pretrained(folder)
    some = {**IN_FLOAT, "lm_head": TorchQuantConfig(group_size=32).qconfig}
    mixed = quantized(model, TorchQuantConfig(group_size=16).qconfig, overrides=some)
    folder = export_checkpoint(mixed, tmp_path / "mixed", format="torch_quant")
    with caplog.at_level(logging.WARNING):
        again = from_pretrained(folder)
    assert "so the weight is dequantized" in caplog.text
    # Only the head runs on a kernel, which rounds activations to 8 bits for each 32 inputs.
    expected = logits(mixed)
    assert (logits(again) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("int8_static", {}, "needs calibration data"),
        ("int4", {}, 'the recipe is "int4"; expected one of'),
        ("int4_weight_only", {"groups": 3}, "has 'groups'"),
    ],
)
def test_recipes_that_do_not_do(recipe: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        TorchQuantConfig(recipe, **options)


def test_experts_are_quantized_but_not_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).save_pretrained(
        tmp_path / "float"
    )
    config = TorchQuantConfig(group_size=32, backend="reference")
    quant_model = from_pretrained(tmp_path / "float", quantization_config=config)
    with pytest.raises(InvalidConfig, match=r"cannot be saved.*modules_to_not_convert"):
        quant_model.save_pretrained(tmp_path / "int4")
    config = TorchQuantConfig(
        group_size=32, backend="reference", modules_to_not_convert=["*.experts*", "*.gate"]
    )
    quant_model = from_pretrained(tmp_path / "float", quantization_config=config)
    quant_model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(from_pretrained(tmp_path / "again")), logits(quant_model))


def test_damaged_folders(tmp_path: Path) -> None:
    folder = export_checkpoint(
        quantized(DECODERS["llama"]()), tmp_path / "model", format="torch_quant"
    )
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight_scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InvalidConfig, match=r"lacks the tensor lm_head\.weight_scale"):
        from_pretrained(folder)


PROBE = """
import sys
{first}
import torch_quant
assert ("transformers" in sys.modules) is bool({first!r})
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print("torch_quant" in AUTO_QUANTIZER_MAPPING)
import torch_quant.integrations.transformers
print("torch_quant" in AUTO_QUANTIZER_MAPPING)
"""


@pytest.mark.parametrize("first", ["import transformers.quantizers.auto", rarely("")])
def test_registered_where_transformers_is_loaded(first: str) -> None:
    code = [sys.executable, "-c", PROBE.format(first=first)]
    found = subprocess.run(code, capture_output=True, text=True, check=True).stdout.split()
    assert found == [str(bool(first)), "True"]
