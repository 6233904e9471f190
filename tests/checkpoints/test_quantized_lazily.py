"""A float checkpoint is quantized file by file, with the integers that the whole model gets."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import DECODERS, ids
from safetensors.torch import load_file, save_file
from torch import nn

from torch_quant import (
    AWQ,
    GPTQ,
    InvalidConfig,
    Quantizer,
    export_checkpoint,
    load_checkpoint,
    quantize_checkpoint,
    recipes,
)

EIGHT = recipes.int8_weight_only()
BATCHES = [ids(2, 12), ids(2, 9)]
Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Write a model as transformers does, in several files, and give it the values written."""

    def write(model: nn.Module, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path / "float"
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        saved = copy.deepcopy(model).to(dtype)  # which rounds the rotary frequencies, too
        saved.save_pretrained(folder, max_shard_size="60KB")  # type: ignore[operator]
        assert len(list(folder.glob("*.safetensors"))) > 1
        return folder

    return write


def quantizer(method: Any = None, **overrides: Any) -> Quantizer:
    qconfig = recipes.int4_weight_only(group_size=32, method=method)
    overrides = {"model.embed_tokens": None, "lm_head": EIGHT, **overrides}
    return Quantizer("reference", qconfig=qconfig, overrides=overrides, capture="modules")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: x for file in folder.glob("*.safetensors") for k, x in load_file(file).items()}


def assert_same_files(found: Path, expected: Path) -> None:
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    configs = [json.loads((each / "config.json").read_text()) for each in (found, expected)]
    assert configs[0] == configs[1]


@pytest.mark.thin
@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("method", [None, GPTQ(full_range=True)], ids=["nearest", "gptq"])
def test_the_integers_of_the_whole_model(
    method: Any, name: str, layout: str, written: Written, tmp_path: Path
) -> None:
    model = DECODERS[name](num_hidden_layers=3)
    folder = written(model, torch.bfloat16)
    batches = None if method is None else BATCHES
    found = quantize_checkpoint(
        quantizer(method), folder, tmp_path / "lazily", layout, batches=batches, progress=False
    )
    whole = quantizer(method)
    if batches is not None:
        whole.round_weights(model, batches, progress=False)
    quant_model = whole.quantize(model, example_inputs=ids())
    assert_same_files(found, export_checkpoint(quant_model, tmp_path / "whole", layout))
    loaded = load_checkpoint(found, backend="reference")
    assert torch.equal(loaded(**ids()).logits, quant_model(**ids()).logits)


def test_quantized_embeddings_and_other_dtypes(written: Written, tmp_path: Path) -> None:
    model = DECODERS["tied"]()
    folder = written(model)
    for i, head in enumerate((EIGHT, None)):
        ours = quantizer(**{"model.embed_tokens": EIGHT, "lm_head": head})
        options: Any = {"dtype": torch.bfloat16}
        found = quantize_checkpoint(ours, folder, tmp_path / f"lazily{i}", **options)
        quant_model = ours.quantize(model, example_inputs=ids())
        assert_same_files(found, export_checkpoint(quant_model, tmp_path / f"whole{i}", **options))


def test_dynamic_activations(written: Written, tmp_path: Path) -> None:
    model = DECODERS["llama"]()
    ours = Quantizer(
        "reference", qconfig=recipes.int8_dynamic(), overrides={"op:embedding": None},
        capture="modules",
    )  # fmt: skip
    found = quantize_checkpoint(ours, written(model), tmp_path / "lazily")
    quant_model = ours.quantize(model, example_inputs=ids())
    assert_same_files(found, export_checkpoint(quant_model, tmp_path / "whole"))


def test_files_of_a_size_and_what_lies_beside_them(written: Written, tmp_path: Path) -> None:
    folder = written(DECODERS["llama"]())
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"weights of others")
    found = quantize_checkpoint(quantizer(), folder, tmp_path / "int4", shard_bytes=20_000)
    names = sorted(each.name for each in found.iterdir())
    files = [name for name in names if name.endswith(".safetensors")]
    count = len(files)
    assert count > 2
    assert files == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    others = ["config.json", "generation_config.json", "tokenizer.json"]
    assert names == sorted([*files, *others, "model.safetensors.index.json"])
    index = json.loads((found / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        x.numel() * x.element_size() for x in tensors(found).values()
    )
    for file in files:
        here = load_file(found / file)
        assert {key for key, name in index["weight_map"].items() if name == file} == set(here)
        size = sum(x.numel() * x.element_size() for x in here.values())
        assert size <= 20_000 or len(here) == 1
    assert load_checkpoint(found, backend="reference")(**ids()).logits.shape == (2, 7, 96)


def test_a_run_that_was_interrupted_goes_on(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(DECODERS["llama"](num_hidden_layers=3))
    whole = quantize_checkpoint(
        quantizer("gptq"), folder, tmp_path / "whole", batches=BATCHES, progress=False
    )
    rounded: list[int] = []
    plain = GPTQ.quantize

    def interrupted(self: GPTQ, *args: Any) -> Any:
        rounded.append(1)
        if len(rounded) == 10:  # of the second block
            raise KeyboardInterrupt
        return plain(self, *args)

    monkeypatch.setattr(GPTQ, "quantize", interrupted)
    options: Any = {"batches": BATCHES, "folder": tmp_path / "blocks", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(quantizer("gptq"), folder, tmp_path / "parts", **options)
    assert not (tmp_path / "parts").exists()
    assert_same_files(
        quantize_checkpoint(quantizer("gptq"), folder, tmp_path / "parts", **options), whole
    )
    assert len(rounded) == 10 + 14  # the first block was not rounded again


def test_blocks_that_were_kept_are_of_the_same_checkpoint(written: Written, tmp_path: Path) -> None:
    """Other weights of a layer that stays in float give later blocks other inputs."""
    model = DECODERS["llama"](num_hidden_layers=2)
    options: Any = {"batches": BATCHES, "folder": tmp_path / "blocks", "progress": False}
    setting = quantizer("gptq", **{"model.layers.0.mlp.down_proj": None})
    quantize_checkpoint(setting, written(model), tmp_path / "one", **options)
    model.model.layers[0].mlp.down_proj.weight.mul_(-3.0)
    with pytest.raises(InvalidConfig, match="made with other weights"):
        quantize_checkpoint(setting, written(model), tmp_path / "two", **options)
    assert not (tmp_path / "two").exists()


def test_batches_of_nothing_and_folders_without_batches(written: Written, tmp_path: Path) -> None:
    folder = written(DECODERS["llama"](num_hidden_layers=2))
    with pytest.raises(InvalidConfig, match="nothing in batches"):
        quantize_checkpoint(quantizer("gptq"), folder, tmp_path / "int4", batches=[])
    with pytest.raises(InvalidConfig, match="batches="):
        quantize_checkpoint(quantizer(), folder, tmp_path / "int4", folder=tmp_path / "blocks")


@pytest.mark.parametrize(
    ("setting", "batches", "message"),
    [
        (quantizer("gptq"), None, "batches="),
        (quantizer("gptq", lm_head=recipes.int4_weight_only(group_size=32, method="gptq")),
         BATCHES, r'overrides=\{"lm_head": '),
        (quantizer(**{"model.layers.0.mlp.up_proj": replace(EIGHT, transforms=(AWQ(),))}),
         BATCHES, "up_proj.*awq"),
        (Quantizer("reference", qconfig=recipes.int8_static(), capture="modules"), None,
         "for float activations"),
        (quantizer(**{"op:linear": None, "lm_head": None}), None, "no linear layer"),
    ],
    ids=["no data", "a head with data", "scales", "ranges", "nothing"],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_any_work(
    setting: Quantizer, batches: Any, message: str, written: Written, tmp_path: Path
) -> None:
    folder = written(DECODERS["llama"](num_hidden_layers=2))
    with pytest.raises(InvalidConfig, match=message):
        quantize_checkpoint(setting, folder, tmp_path / "int4", batches=batches, progress=False)
    assert not (tmp_path / "int4").exists()


def test_folders_that_are_no_float_checkpoints(written: Written, tmp_path: Path) -> None:
    folder = written(DECODERS["llama"]())
    made = quantize_checkpoint(quantizer(), folder, tmp_path / "int4")
    with pytest.raises(InvalidConfig, match="quantized already"):
        quantize_checkpoint(quantizer(), made, tmp_path / "again")
    with pytest.raises(InvalidConfig, match="exists already"):
        quantize_checkpoint(quantizer(), folder, made)
    with pytest.raises(InvalidConfig, match="expected a Quantizer"):
        quantize_checkpoint(folder, folder, tmp_path / "more")  # type: ignore[arg-type]
    shard = next(folder.glob("*.safetensors"))
    held = load_file(shard)
    name = next(iter(held))
    save_file({**held, name: held[name][:-1].clone()}, shard)
    with pytest.raises(InvalidConfig, match=f"the tensor {name} has shape"):
        quantize_checkpoint(quantizer(), folder, tmp_path / "more")
    assert not (tmp_path / "more").exists()
