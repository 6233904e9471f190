"""Folders of compressed-tensors: the same integers and outputs here, the same logits elsewhere."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import DECODERS, IN_FLOAT, ids, integers, quantized, same_integers
from safetensors.torch import load_file, save_file

import torch_quant
from torch_quant import (
    InvalidConfig,
    QConfig,
    export_checkpoint,
    load_checkpoint,
    recipes,
)
from torch_quant.convert.codes import quantized_weights

MISSING = "compressed-tensors is missing: pip install compressed-tensors (it brings loguru, psutil)"


def loaded(folder: Path, **options: Any) -> Any:
    return load_checkpoint(folder, backend="reference", **options)


def about(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("name", DECODERS)
def test_the_same_integers_outputs_and_text(name: str, tmp_path: Path) -> None:
    quant_model = quantized(DECODERS[name]())
    folder = export_checkpoint(quant_model, tmp_path / "int4")
    again = loaded(folder)
    assert same_integers(again, quant_model)
    assert torch.equal(again(**ids(3, 9)).logits, quant_model(**ids(3, 9)).logits)
    assert isinstance(again, type(DECODERS[name]()))
    first, second = (
        each.generate(**ids(1, 5), max_new_tokens=6, do_sample=False)
        for each in (again, quant_model)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "qconfig",
    [
        recipes.int4_weight_only(group_size=None),
        recipes.int8_weight_only(),
        recipes.int8_weight_only(group_size=64),
        QConfig(
            torch_quant.FLOAT,
            torch_quant.QuantSpec.of("int2", granularity=torch_quant.PerGroup(16)),
        ),
    ],
    ids=["int4-channel", "int8-channel", "int8-group", "int2-group"],
)
def test_formats(qconfig: QConfig, tmp_path: Path) -> None:
    quant_model = quantized(DECODERS["llama"](), qconfig)
    again = loaded(export_checkpoint(quant_model, tmp_path / "model"))
    assert same_integers(again, quant_model)
    assert torch.equal(again(**ids()).logits, quant_model(**ids()).logits)


@pytest.mark.parametrize("backend", ["reference", "onednn"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_activations(symmetric: bool, backend: str, tmp_path: Path) -> None:
    """``int-quantized``; other layers may be in float or have weights alone quantized."""
    model, some = DECODERS["qwen2"](), {"lm_head": recipes.int4_weight_only(group_size=32)}
    quantizer = torch_quant.Quantizer(
        recipes.int8_dynamic(symmetric=symmetric), backend=backend, overrides=IN_FLOAT | some
    )
    quant_model = quantizer.quantize(model, example_inputs=ids())
    folder = export_checkpoint(quant_model, tmp_path / "model")
    config = about(folder)["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert [each["format"] for each in config["config_groups"].values()] == [
        "int-quantized", "pack-quantized",
    ]  # fmt: skip
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    again = load_checkpoint(folder, backend=backend)
    assert same_integers(again, quant_model)
    assert torch.equal(again(**ids()).logits, quant_model(**ids()).logits)


def test_several_formats_and_layers_in_float(tmp_path: Path) -> None:
    overrides = {
        **IN_FLOAT, "lm_head": None, "*.down_proj": recipes.int8_weight_only(),
        "model.layers.0.self_attn.o_proj": None,
    }  # fmt: skip
    quant_model = quantized(DECODERS["llama"](), overrides=overrides)
    folder = export_checkpoint(quant_model, tmp_path / "model")
    config = about(folder)["quantization_config"]
    assert config["ignore"] == ["model.layers.0.self_attn.o_proj", "lm_head"]
    assert [len(each["targets"]) for each in config["config_groups"].values()] == [5, 1]
    again = loaded(folder)
    assert same_integers(again, quant_model)
    assert torch.equal(again(**ids()).logits, quant_model(**ids()).logits)


def test_tied_weights_stay_tied_where_both_are_float(tmp_path: Path) -> None:
    quant_model = quantized(DECODERS["tied"](), overrides={**IN_FLOAT, "lm_head": None})
    folder = export_checkpoint(quant_model, tmp_path / "tied")
    tensors = load_file(folder / "model.safetensors")
    assert about(folder)["tie_word_embeddings"] is True
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors
    again = loaded(folder)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(**ids()).logits, quant_model(**ids()).logits)


def test_a_quantized_head_is_not_tied_any_more(tmp_path: Path) -> None:
    folder = export_checkpoint(quantized(DECODERS["tied"]()), tmp_path / "untied")
    tensors = load_file(folder / "model.safetensors")
    assert about(folder)["tie_word_embeddings"] is False
    assert {"model.embed_tokens.weight", "lm_head.weight_packed"} <= tensors.keys()


def test_a_quantized_embedding_is_written_as_what_it_stands_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quant_model = quantized(DECODERS["llama"](), overrides={})
    with caplog.at_level(logging.WARNING):
        folder = export_checkpoint(quant_model, tmp_path / "model")
    assert "model.embed_tokens" in caplog.text
    again = loaded(folder)
    assert integers(quant_model).keys() - integers(again).keys() == {"model.embed_tokens"}
    assert torch.equal(again(**ids()).logits, quant_model(**ids()).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smaller_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    quant_model = quantized(DECODERS["llama"]())
    folder = export_checkpoint(quant_model, tmp_path / "model", dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    assert {x.dtype for x in tensors.values() if x.is_floating_point()} == {dtype}
    assert about(folder)["dtype"] == str(dtype).removeprefix("torch.")
    again = loaded(folder)
    for name, (codes, scale, _) in integers(quant_model).items():
        assert torch.equal(integers(again)[name][0], codes)
        assert torch.equal(integers(again)[name][1], scale.to(dtype).to(torch.float32))
    # Weights and scales are rounded to 8 bits of mantissa at least: 1 / 512 of each at most.
    expected = quant_model(**ids()).logits
    assert (again(**ids()).logits - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_whole_graph_and_a_saved_model_are_written_alike(tmp_path: Path) -> None:
    model = DECODERS["tied"]()
    quant_model = quantized(model)
    expected = load_file(export_checkpoint(quant_model, tmp_path / "a") / "model.safetensors")
    torch_quant.save(quant_model, tmp_path / "saved")
    others = [quantized(model, capture="whole"), torch_quant.load(tmp_path / "saved", model)]
    for i, other in enumerate(others):
        found = load_file(export_checkpoint(other, tmp_path / f"b{i}") / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_a_model_is_given_and_what_was_loaded_is_saved(tmp_path: Path) -> None:
    quant_model = quantized(DECODERS["llama"]())
    folder = export_checkpoint(quant_model, tmp_path / "model")
    other = DECODERS["llama"]()
    before = {name: x.clone() for name, x in other.state_dict().items()}
    again = loaded(folder, model=other)
    expected = quant_model(**ids()).logits
    assert torch.equal(again(**ids()).logits, expected)
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())
    torch_quant.save(again, tmp_path / "saved")
    assert torch.equal(torch_quant.load(tmp_path / "saved", other)(**ids()).logits, expected)
    anew = export_checkpoint(again, tmp_path / "again")
    assert (anew / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.long("three seconds")
def test_as_one_graph_and_other_kinds_of_calls(tmp_path: Path) -> None:
    quant_model = quantized(DECODERS["llama"]())
    folder = export_checkpoint(quant_model, tmp_path / "model")
    whole = loaded(folder, capture="whole", example_inputs={**ids(), "use_cache": False})
    expected = quant_model(**ids()).logits
    # One graph sums in another order than PyTorch's modules do: some units of float32's last place.
    torch.testing.assert_close(whole(**ids()).logits, expected, rtol=1e-5, atol=1e-5)
    again, x = loaded(folder), torch.randn(64)  # no call of the example is of one dimension
    head = quantized_weights(quant_model)["lm_head"].values()
    torch.testing.assert_close(again.lm_head(x), head @ x, rtol=1e-5, atol=1e-5)


def test_several_files_with_an_index(tmp_path: Path) -> None:
    quant_model = quantized(DECODERS["qwen2"]())
    folder = export_checkpoint(quant_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    halves = {
        "model-00001-of-00002.safetensors": dict(list(tensors.items())[::2]),
        "model-00002-of-00002.safetensors": dict(list(tensors.items())[1::2]),
    }
    for file, half in halves.items():
        save_file(half, folder / file)
    weight_map = {name: file for file, half in halves.items() for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InvalidConfig, match="two models, of which transformers reads the first"):
        loaded(folder)
    (folder / "model.safetensors").unlink()
    assert torch.equal(loaded(folder)(**ids()).logits, quant_model(**ids()).logits)


def test_a_layer_that_the_backend_has_no_kernel_for_is_dequantized(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Here since no call of the example reaches it."""
    import transformers

    class Gated(transformers.LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, loud: bool = False) -> torch.Tensor:
            hidden = self.model(input_ids).last_hidden_state
            return self.lm_head(hidden) if loud else hidden

    torch.manual_seed(0)
    model = Gated(DECODERS["llama"]().config).eval()
    loud = {**ids(), "loud": True}
    quantizer = torch_quant.Quantizer(
        "reference", qconfig=recipes.int4_weight_only(group_size=32), overrides=IN_FLOAT,
        capture="modules",
    )  # fmt: skip
    quant_model = quantizer.quantize(model, example_inputs=loud)
    folder = export_checkpoint(quant_model, tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        again = loaded(folder, model=model)
    assert "lm_head: no call of the example reaches it" in caplog.text
    assert "lm_head" not in integers(again)
    assert torch.equal(again(**loud), quant_model(**loud))


@pytest.mark.parametrize(
    "qconfig",
    [recipes.int4_weight_only(group_size=32), recipes.int4_weight_only(group_size=None),
     recipes.int8_weight_only(), recipes.int8_weight_only(group_size=32)],
    ids=["int4", "int4-channel", "int8-channel", "int8"],
)  # fmt: skip
def test_models_on_kernels_are_written_and_read(qconfig: QConfig, tmp_path: Path) -> None:
    model = DECODERS["qwen2"]()
    reference = quantized(model, qconfig, overrides={})
    quantizer = torch_quant.Quantizer(qconfig, backend="onednn")
    quant_model = quantizer.quantize(model, example_inputs=ids())
    assert same_integers(quant_model, reference)
    again = load_checkpoint(export_checkpoint(quant_model, tmp_path / "model"), backend="onednn")
    assert again.quantization.backend == "onednn"
    linear = integers(again)
    assert linear.keys() == integers(reference).keys() - {"model.embed_tokens"}
    assert all(torch.equal(codes, integers(reference)[n][0]) for n, (codes, *_) in linear.items())
    assert torch.equal(again(**ids()).logits, quant_model(**ids()).logits)


@pytest.mark.parametrize("transform", ["awq", "teq"])
def test_factors_that_went_into_other_weights(transform: str, tmp_path: Path) -> None:
    """Of norms and of the layers before: then the layer itself is a plain one."""
    asked = recipes.int4_weight_only(group_size=32).to_dict() | {"transforms": [transform]}
    asked["method"] = {"name": "rtn"}  # over the full range, TEQ finds nothing to scale here
    model = DECODERS["qwen2"]()
    quantizer = torch_quant.Quantizer(
        QConfig.from_dict(asked), backend="reference", overrides=IN_FLOAT
    )
    quantizer.round_weights(model, [ids(4, 16)], progress=False)
    quant_model = quantizer.quantize(model, example_inputs=ids())
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(quant_model.state_dict()[norm], model.state_dict()[norm])
    again = loaded(export_checkpoint(quant_model, tmp_path / "model"))
    assert same_integers(again, quant_model)
    assert torch.equal(again(**ids()).logits, quant_model(**ids()).logits)


# Others


@pytest.mark.parametrize("name", DECODERS)
def test_transformers_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason=MISSING)
    import transformers

    quant_model = quantized(DECODERS[name]())
    folder = export_checkpoint(quant_model, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = quant_model(**ids()).logits
    # Both multiply the same integers and scales in float32, and the same matrices by PyTorch.
    torch.testing.assert_close(theirs(**ids()).logits, expected, rtol=1e-6, atol=1e-6)


def test_transformers_rounds_activations_alike(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason=MISSING)
    import transformers

    quant_model = quantized(DECODERS["qwen2"](), recipes.int8_dynamic())
    folder = export_checkpoint(quant_model, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    # The same codes but for values at the border of two, which float rounding decides.
    assert torch_quant.sqnr(quant_model(**ids()).logits, theirs(**ids()).logits) > 50


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, None), (2, 16)])
def test_what_the_library_itself_writes_is_read(
    bits: int, group: int | None, symmetric: bool, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason=MISSING)
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    folder = export_checkpoint(quantized(DECODERS["llama"]()), tmp_path / "model")
    config = about(folder)
    scheme = config["quantization_config"]["config_groups"]["group_0"]
    strategy = "channel" if group is None else "group"
    scheme["weights"] |= {
        "num_bits": bits, "group_size": group, "symmetric": symmetric, "strategy": strategy,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    library = QuantizationScheme.model_validate(scheme)
    model = DECODERS["llama"]()
    tensors = dict(model.state_dict())
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = tensors.pop(f"{path}.weight")
            blocks = weight.reshape(len(weight), -1, group or weight.shape[1])
            low, high = blocks.amin(-1), blocks.amax(-1)
            scale = (high - low).clamp(min=1e-6) / (2**bits - 1)
            zero = (-(2 ** (bits - 1)) - low / scale).round().to(torch.int8)
            if symmetric:
                scale, zero = low.abs().maximum(high) / (2 ** (bits - 1) - 0.5), zero * 0
            state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
            found = PackedQuantizationCompressor.compress(state, library)
            dense = PackedQuantizationCompressor.decompress(found, library)["weight"]
            module.weight.data = dense
            tensors |= {f"{path}.{key}": x for key, x in found.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    again = loaded(folder)
    assert len(integers(again)) == 8
    # The same values by another order of operations: (q - z) * s in both, so nothing but sums.
    torch.testing.assert_close(again(**ids()).logits, model(**ids()).logits, rtol=1e-6, atol=1e-6)
