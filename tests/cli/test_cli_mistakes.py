"""The most likely mistakes: each gets a message that names the fix, and leaves nothing behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
import pytest
from commands import data_of, entries, linked, make_home, run

from torch_quant.backends import known_backends


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("mistakes")
    make_home(home)
    return home


@pytest.fixture
def home(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return linked(models, tmp_path, monkeypatch)


MISTAKES = {
    "wrong path": (
        ["my-brt", "--data", "texts.txt"], "did you mean my-bert?"),
    "a name of the hub": (
        ["acme/bert", "--data", "texts.txt"], "hf download acme/bert --local-dir bert"),
    "no Hugging Face folder": (
        ["empty", "--data", "texts.txt"], "model.save_pretrained(folder)"),
    "weights without their code": (
        ["net.safetensors", "--data", "inputs.npz"], "--factory package.module:function"),
    "a factory that does not import": (
        ["no_such_net:make", "--data", "inputs.npz"], "PYTHONPATH=folder torch-quant ..."),
    "a factory that is not there": (
        ["net:mke", "--data", "inputs.npz"], "['make'"),
    "a factory that makes no model": (
        ["net:not_a_model", "--data", "inputs.npz"], "expected an nn.Module"),
    "weights of another model": (
        ["other.safetensors", "--factory", "net:make", "--data", "inputs.npz"],
        "does not fit the model that net:make makes"),
    "unknown recipe": (
        ["net:make", "--data", "inputs.npz", "--recipe", "int8_statc"], "did you mean int8_static"),
    "unknown option of a recipe": (
        ["net:make", "--recipe", "int4_weight_only", "-o", "group=32"], "group_size"),
    "a configuration that is not there": (
        ["net:make", "--data", "inputs.npz", "--config", "p.yaml"], "there is no such file"),
    "a mistake in a configuration": (
        ["net:make", "--data", "inputs.npz", "--config", "wrong.yaml"], "wrong.yaml, line 2"),
    "data that is not there": (
        ["net:make", "--data", "input.npz"], "there is no such file or folder"),
    "no data": (
        ["net:make"], "--recipe int8_dynamic"),
    "data of a wrong shape": (
        ["net:make", "--data", "wide.npz"], "x: float32 [8, 5]"),
    "data under wrong names": (
        ["my-bert", "--data", "names.npz"], "numpy.savez(file, input_ids=...)"),
    "one array under a wrong name": (
        ["my-bert", "--data", "name.npz"], "inptu_ids is no input of the model; did you mean"),
    "a misspelt array beside a right one": (
        ["my-bert", "--data", "mask.npz"], "numpy.savez(file, attention_mask=...)"),
    "a misspelt list of numbers": (
        ["my-bert", "--data", "numbers.jsonl"], "line 2: inptu_ids is no input of the model; did"),
    "images of bytes": (
        ["pixels:make", "--data", "pixels.npz"], "(input.float() / 255 - mean) / std"),
    "arrays of different lengths": (
        ["my-bert", "--data", "rows.npz"], "the same number of rows"),
    "text without a tokenizer": (
        ["bare", "--data", "texts.txt"], "--tokenizer FOLDER"),
    "text for a model of arrays": (
        ["net:make", "--data", "texts.txt"], "token ids as a .npz"),
    "an empty file": (
        ["my-bert", "--data", "empty.txt"], "is empty"),
    "a file of empty lines": (
        ["my-bert", "--data", "blank.txt"], "holds no sample"),
    "an array without rows": (
        ["net:make", "--data", "none.npz"], "holds no sample"),
    "a folder without images": (
        ["net:make", "--data", "empty"], "holds no image"),
    "a format that is not read": (
        ["net:make", "--data", "array.npy"], "numpy.savez"),
    "the output exists": (
        ["net:make", "--data", "inputs.npz", "--out", "my-bert"], "left alone"),
    "the output's folder does not exist": (
        ["net:make", "--data", "inputs.npz", "--out", "no/such/int8"], "mkdir -p no/such"),
    "unknown backend": (
        ["net:make", "--data", "inputs.npz", "--backend", "onedn"], "did you mean onednn"),
    "unknown layer": (
        ["net:make", "--data", "inputs.npz", "--float", "frist"], "did you mean first"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_is_answered_with_the_fix(home: Path, mistake: str) -> None:
    arguments, fix = MISTAKES[mistake]
    (home / "empty").mkdir()
    (home / "bare").mkdir()
    shutil.copytree("my-bert", "bare", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("tokenizer*"))  # fmt: skip
    (home / "other.safetensors").symlink_to(home / "my-bert" / "model.safetensors")
    (home / "empty.txt").write_text("")
    (home / "blank.txt").write_text("\n \n")
    (home / "wrong.yaml").write_text("backend: onednn\noverides: {}\n")
    numpy.savez("wide.npz", x=numpy.ones((16, 5), "float32"))
    numpy.savez("none.npz", x=numpy.ones((0, 32), "float32"))
    numpy.savez("names.npz", ids=numpy.ones((4, 5), "int64"), mask=numpy.ones((4, 5), "int64"))
    numpy.savez("rows.npz", input_ids=numpy.ones((4, 5), "int64"),
                attention_mask=numpy.ones((3, 5), "int64"))  # fmt: skip
    numpy.save("array.npy", numpy.ones(3))
    ids = numpy.ones((4, 5), "int64")
    numpy.savez("name.npz", inptu_ids=ids)
    numpy.savez("mask.npz", input_ids=ids, atention_mask=ids)
    (home / "numbers.jsonl").write_text('{"input_ids": [1, 2]}\n{"inptu_ids": [1, 2]}\n')
    (home / "pixels.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 3)).eval()\n"
    )
    numpy.savez("pixels.npz", input=numpy.ones((4, 3, 8, 8), "uint8"))
    before = entries(home)
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "int8"]
    result = run("quantize", *arguments, expect=2)
    said = " ".join(result.stderr.split())
    assert fix in said, result.stderr
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert result.stdout == ""
    assert max(map(len, result.stderr.splitlines())) <= 100
    assert entries(home) == before


def test_a_backend_that_does_not_run_here(home: Path) -> None:
    missing = [each for each in known_backends() if each.unavailable()]
    if not missing:
        pytest.skip("every backend runs here")
    before = entries(home)
    result = run("quantize", "net:make", "--data", "inputs.npz", "--backend", missing[0].name,
                 "--out", "int8", expect=3)  # fmt: skip
    assert " ".join(str(missing[0].unavailable()).split()) in " ".join(result.stderr.split())
    assert entries(home) == before


def test_an_interruption_leaves_nothing(home: Path) -> None:
    before = entries(home)
    said = run("quantize", "net:make", "--data", "net:interrupted", "--out", "int8", expect=130)
    assert said.stderr == "error: interrupted: nothing was written\n"
    assert entries(home) == before


def test_an_interruption_of_an_overwrite_leaves_what_was_there(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("quantize", "net:make", "--data", "inputs.npz", "--out", "int8")
    before = {each.name: each.read_bytes() for each in (home / "int8").iterdir()}
    (home / "stopping.py").write_text(
        "import net\n\n\ndef make():\n    net.STOP_AT = net.CALLS + 4\n    return net.make()\n"
    )
    run("quantize", "stopping:make", "--data", "inputs.npz", "--out", "int8", "--overwrite",
        expect=130)  # fmt: skip
    assert {each.name: each.read_bytes() for each in (home / "int8").iterdir()} == before
    assert not [name for name in entries(home) if name.startswith(".")]


def test_a_mistake_as_json(home: Path) -> None:
    found = data_of("quantize", "my-brt", "--data", "texts.txt", "--out", "int8", expect=2)
    assert found["exit_code"] == 2
    assert "did you mean my-bert?" in found["error"]


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["inspect", "int9"], "there is no file or folder int9"),
        (["inspect", "my-bert"], "torch-quant quantize my-bert"),
        (["inspect", "texts.txt"], ".onnx"),
        (["bench", "my-bert"], "torch-quant.json"),
        (["compare", "my-bert", "my-llm"], "give --data"),
        (["generate", "my-bert", "--prompt", "the"], "writes no text"),
        (["generate", "my-llm", "--prompt", " "], "--prompt is empty"),
        (["export", "nowhere", "--to", "onnx", "--out", "x.onnx"], "there is no folder nowhere"),
        (["export", "nowhere", "--to", "onnx", "--out", "x.txt"], "ends in .onnx"),
        (["export", "nowhere", "--to", "pt2", "--out", "my-bert"], "is a folder"),
        (["export", "nowhere", "--to", "pt2", "--out", "no/x.pt2"], "mkdir -p no"),
    ],
)
def test_mistakes_with_other_commands(home: Path, arguments: list[str], fix: str) -> None:
    before = entries(home)
    said = run(*arguments, expect=2).stderr
    assert fix in " ".join(said.split())
    assert entries(home) == before


@pytest.mark.parametrize(
    ("model", "arrays"),
    [
        ("net:make", ["anything"]),  # its one input
        ("my-bert", ["arr_0"]),  # positions, as savez names them
        ("my-bert", ["input_ids", "attention_mask"]),
        ("open:make", ["input_ids", "whatever"]),  # nothing says what **kwargs takes
        ("open:Batch", ["input_ids", "whatever"]),
    ],
)
def test_names_of_arrays_that_are_right(home: Path, model: str, arrays: list[str]) -> None:
    (home / "open.py").write_text(
        "import net\n\n\nclass Open(net.Net):\n"
        "    def forward(self, input_ids, mask=None, **kwargs):\n"
        "        return super().forward(input_ids)\n\n\nmake = Open\n\n\n"
        "class Batch(net.Net):\n    def forward(self, **batch):\n"
        "        return super().forward(batch['input_ids'])\n"
    )
    shape, kind = ((8, 5), "int64") if model == "my-bert" else ((8, 32), "float32")
    numpy.savez("right.npz", **{name: numpy.ones(shape, kind) for name in arrays})
    run("quantize", model, "--data", "right.npz", "--out", "int8")


def test_a_misspelt_name_beside_others_that_kwargs_may_take(home: Path) -> None:
    (home / "open.py").write_text(
        "import net\n\n\nclass Open(net.Net):\n"
        "    def forward(self, input_ids, mask=None, **kwargs):\n"
        "        return super().forward(input_ids)\n\n\nmake = Open\n"
    )
    numpy.savez("wrong.npz", input_ids=numpy.ones((8, 32), "float32"), maks=numpy.ones((8, 2)))
    said = run("quantize", "open:make", "--data", "wrong.npz", "--out", "int8", expect=2).stderr
    assert "maks is no input of the model; did you mean mask?" in said
