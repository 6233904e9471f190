"""``torch-quant quantize``: every kind of model and data, and a folder that loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from commands import NET, Net, data_of, entries, linked, make_home, run
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, ViTConfig, ViTModel

import torch_quant
from torch_quant import Quantizer, sqnr
from torch_quant_cli.artifact import Artifact
from torch_quant_cli.data import Reading, batches


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("cli")
    make_home(home)
    return home


@pytest.fixture
def home(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own in which the models of the module lie."""
    return linked(models, tmp_path, monkeypatch)


def _float() -> Net:
    model = Net()
    model.load_state_dict(load_file("net.safetensors"))
    return model.eval()


def test_weights_with_a_factory_and_arrays(home: Path) -> None:
    found = data_of("quantize", "net.safetensors", "--factory", "net:make", "--data", "inputs.npz",
                    "--samples", "48", "--out", "int8")  # fmt: skip
    assert found["coverage"] == 1.0
    assert found["samples"] == 48
    assert found["outputs"]["held_out"]
    assert found["outputs"]["sqnr_db"] > 25.0
    x = torch.from_numpy(numpy.load("inputs.npz")["x"])
    loaded = Artifact("int8").quant_model()
    assert sqnr(_float()(x), loaded(x)) > 25.0
    quantizer = Quantizer.load("int8")
    assert torch.equal(quantizer.quantize(_float(), example_inputs=x)(x), loaded(x))
    assert quantizer.state.batches == 6
    assert not [name for name in entries(home) if name.startswith(".")]


def test_again_needs_overwrite_and_replaces_the_whole(home: Path) -> None:
    run("quantize", "net:make", "--data", "net:inputs", "--out", "int8")
    run("quantize", "net:make", "--data", "net:inputs", "--out", "int8", expect=2)
    before = entries(home / "int8")
    found = data_of("quantize", "net:make", "--data", "net:inputs", "--recipe", "fast",
                    "--out", "int8", "--overwrite", "--no-example")  # fmt: skip
    assert found["recipe"] == "fast"
    after = entries(home / "int8")
    assert "example.safetensors" in before - after
    assert len([name for name in after if name.startswith("tensors-")]) == 2
    assert Artifact("int8").example() is None


def test_an_exported_program(home: Path) -> None:
    x = torch.randn(8, 32)
    batch = torch.export.Dim("batch")
    program = torch.export.export(_float(), (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, "net.pt2")
    found = data_of("quantize", "net.pt2", "--data", "inputs.npz", "--out", "int8")
    assert found["quantized"] == 2
    Path("net.pt2").unlink()  # a graph is in the folder as it is
    assert sqnr(_float()(x), Artifact("int8").quant_model()(x)) > 25.0


def test_options_make_the_quantizer(home: Path) -> None:
    found = data_of("quantize", "net:make", "--data", "inputs.npz", "--config", "q.yaml",
                    "--recipe", "int8_static", "-o", "observer=histogram", "--backend",
                    "reference", "--out", "int8")  # fmt: skip
    assert found["backend"] == "reference"
    assert found["settings"]["overrides"] == {"second": None}
    assert found["settings"]["qconfig"]["observer"] == "histogram"
    assert found["quantized"] == 1
    found = data_of("quantize", "net:make", "--data", "inputs.npz", "--float", "first",
                    "--out", "other")  # fmt: skip
    assert found["quantized"] == 1


def test_the_worst_layers_fall_back(home: Path) -> None:
    found = data_of("quantize", "net:make", "--data", "inputs.npz", "--fallback", "1",
                    "--out", "mixed")  # fmt: skip
    assert len(found["fallen_back"]) == 1
    assert found["quantized"] == 1
    assert "back in float:" in run("quantize", "net:make", "--data", "inputs.npz", "--min-sqnr",
                                   "45", "--out", "fine").stdout  # fmt: skip


def test_text_and_a_hugging_face_folder(home: Path) -> None:
    found = data_of("quantize", "my-bert", "--data", "texts.txt", "--out", "my-bert-int8")
    assert found["samples"] == 40
    assert found["coverage"] == 1.0
    artifact = Artifact("my-bert-int8")
    inputs = artifact.example()
    expected = AutoModel.from_pretrained("my-bert")(**inputs).last_hidden_state
    loaded = artifact.quant_model()
    assert type(loaded.config).__name__ == "BertConfig"
    assert sqnr(expected, loaded(**inputs).last_hidden_state) > 20.0
    assert (home / "my-bert-int8" / "tokenizer.json").is_file()


def test_weights_alone_need_no_data(home: Path) -> None:
    found = data_of("quantize", "my-llm", "--recipe", "int8_weight_only", "--out", "int8")
    assert found["samples"] == 0
    assert found["outputs"] is None
    written = data_of("generate", "int8", "--prompt", "the model", "--max-new-tokens", "3")
    assert len(written["tokens"]) == 3
    again = data_of("generate", "my-llm", "--prompt", "the model", "--max-new-tokens", "3")
    assert written["tokens"] == again["tokens"]


def test_a_model_that_writes_does_so_after_loading(home: Path) -> None:
    """With the prompt, and with each token behind it and a cache, which are other calls."""
    how = ("--data", "texts.txt", "--samples", "2", "--length", "16", "--recipe", "fast")
    data_of("quantize", "my-llm", *how, "--out", "int8")
    ask = ("--prompt", "the cat sees", "--max-new-tokens", "3")
    found, expected = (data_of("generate", each, *ask) for each in ("int8", "my-llm"))
    assert found["tokens"] == expected["tokens"]


def test_rounding_goes_on_where_it_was_interrupted(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "blocks.py").write_text(
        NET + "\n\ndef blocks():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(*(Residual() for _ in range(3)))\n\n\n"
        "class Residual(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.inner = nn.Linear(32, 32)\n\n    def forward(self, x):\n"
        "        global CALLS\n        CALLS += 1\n"
        "        if STOP_AT is not None and CALLS >= STOP_AT:\n"
        "            raise KeyboardInterrupt\n        return x + self.inner(x)\n"
    )
    command = ("quantize", "blocks:blocks", "--data", "net:inputs", "--recipe",
               "int4_weight_only", "-o", "group_size=32", "-o", "method=gptq")  # fmt: skip
    data_of(*command, "--out", "whole")
    import blocks  # type: ignore[import-not-found]

    calls = blocks.CALLS
    monkeypatch.setattr(blocks, "CALLS", 0)
    monkeypatch.setattr(blocks, "STOP_AT", None)
    for stop in range(calls - 1, 0, -1):  # before the end, and after a block was finished
        monkeypatch.setattr(blocks, "CALLS", 0)
        monkeypatch.setattr(blocks, "STOP_AT", stop)
        said = run(*command, "--out", "resumed", expect=130).stderr
        unfinished = home / "resumed.unfinished"
        if unfinished.is_dir() and any(unfinished.iterdir()) and "goes on" in said:
            break
    assert not (home / "resumed").exists()
    kept = {each: each.stat().st_mtime_ns for each in unfinished.rglob("*") if each.is_file()}
    assert kept
    monkeypatch.setattr(blocks, "STOP_AT", None)
    run(*command, "--out", "resumed")
    assert not unfinished.exists()
    x = torch.randn(4, 32)
    first, second = (Artifact(each).quant_model() for each in ("whole", "resumed"))
    assert torch.equal(first(x), second(x))


def test_roundings_are_learned_after_calibration(home: Path) -> None:
    """By a recipe's option, and where only an override has such a method."""
    command = ("quantize", "net:make", "--data", "net:inputs", "--backend", "reference")
    method = {"name": "adaround", "iterations": 3}
    weight = {"element": "int4", "granularity": "per_channel"}
    settings = {"overrides": {"second": {"weight": weight, "method": method}}}
    Path("config.json").write_text(json.dumps(settings))
    data_of(*command, "--config", "config.json", "--out", "one")
    data_of(*command, "--recipe", "int8_static", "-o", "method=adaround", "--out", "all")
    x = torch.randn(4, 32)
    for folder, sites in (("one", ["second"]), ("all", ["first", "second"])):
        quantizer = Quantizer.load(folder)
        assert sorted(quantizer.state.rounded.sites) == sites
        found = quantizer.quantize(_float(), example_inputs=x)(x)
        assert torch.equal(found, Artifact(folder).quant_model()(x))


def test_every_kind_of_data_gives_the_same_inputs(home: Path) -> None:
    arrays = {"x": numpy.load("inputs.npz")["x"][:6]}
    numpy.savez("named.npz", **arrays)
    numpy.savez("positional.npz", arrays["x"])
    save_file({"x": torch.from_numpy(arrays["x"])}, "arrays.safetensors")
    Path("rows.jsonl").write_text("\n".join(json.dumps({"x": x.tolist()}) for x in arrays["x"]))
    model, expected = Net(), torch.from_numpy(arrays["x"])
    for name in ("named.npz", "positional.npz", "arrays.safetensors", "rows.jsonl"):
        found = batches(name, model, None, Reading(samples=6, batch_size=4))
        values = [each["x"] if isinstance(each, dict) else each[0] for each in found]
        assert torch.allclose(torch.cat(values), expected), name
    assert len(batches("net:inputs", model, None, Reading(samples=2))) == 2
    shortened = batches("named.npz", model, None, Reading(samples=3, batch_size=2))
    assert [len(each["x"]) for each in shortened] == [2, 1]


def test_texts_of_a_jsonl_and_windows_of_a_decoder(home: Path) -> None:
    lines = Path("texts.txt").read_text().splitlines()
    Path("texts.jsonl").write_text("\n".join(json.dumps({"body": line}) for line in lines))
    Path("strings.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    model, folder = AutoModel.from_pretrained("my-bert"), Path("my-bert")
    plain = batches("texts.txt", model, folder, Reading(samples=3))
    fielded = batches("texts.jsonl", model, folder, Reading(samples=3, text_field="body"))
    strings = batches("strings.jsonl", model, folder, Reading(samples=3))
    for a, b, c in zip(plain, fielded, strings, strict=True):
        assert {*a} == {"input_ids", "attention_mask"}
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["input_ids"], c["input_ids"])
    (padded,) = batches("texts.txt", model, folder, Reading(samples=3, batch_size=3))
    assert padded["attention_mask"].sum() == sum(each["input_ids"].numel() for each in plain)
    from transformers import AutoModelForCausalLM

    decoder = AutoModelForCausalLM.from_pretrained("my-llm")
    windows = batches("texts.txt", decoder, Path("my-llm"), Reading(samples=4, length=16))
    assert [each["input_ids"].shape for each in windows] == [(1, 16)] * 4


def test_images_are_prepared_as_the_folder_says(home: Path) -> None:
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=64, image_size=16, patch_size=8)  # fmt: skip
    ViTModel(config).save_pretrained("vit")
    said = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (Path("vit") / "preprocessor_config.json").write_text(json.dumps(said))
    Path("pictures/of").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (40, 20 + i), (255, 0, 51)).save(f"pictures/of/{i}.png")
    (found,) = batches("pictures", AutoModel.from_pretrained("vit"), Path("vit"), Reading())
    assert found["pixel_values"].shape == (3, 3, 16, 16)
    for channel, value in enumerate((1.0, -1.0, -0.6)):
        expected = torch.full((3, 16, 16), value)
        torch.testing.assert_close(found["pixel_values"][:, channel], expected)
    (large,) = batches("pictures", Net(), None, Reading(image_size=8))
    assert large.shape == (3, 3, 8, 8)


def test_what_a_folder_holds_is_read_by_the_package(home: Path) -> None:
    run("quantize", "net:make", "--data", "net:inputs", "--out", "int8")
    import net  # type: ignore[import-not-found]

    x = torch.randn(5, 32)
    assert torch.equal(torch_quant.load("int8")(x), torch_quant.load("int8", net.make())(x))
