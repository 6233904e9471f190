"""``inspect``, ``compare``, ``bench``, ``export`` and ``generate`` on folders of ``quantize``."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import numpy
import pytest
import torch
from commands import data_of, entries, make_home, run
from thinning import rarely
from transformers import AutoModelForCausalLM

import torch_quant
from torch_quant import Quantizer, sqnr
from torch_quant_cli.artifact import Artifact
from torch_quant_cli.main import COMMANDS, cli

PAGE = Path(__file__).parents[2] / "docs" / "command_line.md"


def _joined(text: str) -> str:
    return re.sub(r"\\\n\s*", "", text)


def _of_help() -> list[str]:
    found = []
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        text = _joined(command.help or "")
        found += [line.strip() for line in text.splitlines() if "torch-quant " in line]
    return [line for line in found if re.match(r"(echo .*\| )?torch-quant ", line)]


def _of_page() -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in _joined(block).splitlines()]
    return [line for line in lines if line.startswith("torch-quant ")]


@pytest.fixture(scope="module")
def examples(home: Path) -> set[str]:
    """Every example that ``--help`` and the documentation show runs as it stands there."""
    done: set[str] = set()
    for line in [*_of_help(), *_of_page()]:
        command = line.partition(" >> ")[0].strip()
        if command in done:
            continue
        done.add(command)
        typed, _, piped = command.rpartition("| ")
        arguments = shlex.split(piped)[1:]
        if arguments[0] == "bench":
            arguments += ["--seconds", "0.01", "--backend", "onednn"]
        run(*arguments, stdin=shlex.split(typed)[1] if typed else None)
    return done


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that the examples of ``--help`` speak of."""
    home = tmp_path_factory.mktemp("reports")
    make_home(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.syspath_prepend(str(home))
        net = ("net:make", "--data", "inputs.npz")
        run("quantize", *net, "--float", "second", "--out", "one-int8")
        run("quantize", *net, "--out", "whole-int8")
        yield home


@pytest.fixture(autouse=True)
def there(home: Path, examples: set[str]) -> None:
    """All tests run where the examples ran, and on what these wrote."""


@pytest.mark.long("fifteen seconds; each command has tests of its own")
def test_examples_are_shown_for_all_commands(examples: set[str]) -> None:
    shown = {each.rpartition("| ")[2].split()[1] for each in examples}
    assert shown == {*COMMANDS}
    assert len(examples) > 15


def test_inspect_tells_formats_ranges_and_reasons() -> None:
    found = data_of("inspect", "one-int8")
    first, second = found["sites"]
    assert (first["name"], first["format"], first["quantized"]) == ("first", "int8", True)
    x = numpy.load("inputs.npz")["x"]  # all 64 samples calibrated
    low, high = first["range"]
    assert low == pytest.approx(x.min(), rel=1e-5)
    assert high == pytest.approx(x.max(), rel=1e-5)
    assert second["reason"] == "left in float by an override"
    text = run("inspect", "one-int8").stdout
    assert "second: left in float by an override" in text
    assert "calibrated on 64 samples of inputs.npz" in text.replace("\n  ", " ")
    assert "first " not in run("inspect", "one-int8", "--float").stdout.partition("layer")[2]


def test_report_shows_what_inspect_and_compare_say(tmp_path: Path) -> None:
    found = data_of("report", "one-int8", "--out", str(tmp_path / "page.html"))
    first, second = found["layers"]
    assert second["reason"] == data_of("inspect", "one-int8")["sites"][1]["reason"]
    compared = data_of("compare", "net:make", "one-int8")["layers"]["one-int8"]
    assert found["comparison"]["outputs"] == pytest.approx(compared["outputs_db"], rel=1e-4)
    assert first["error"]["after"] == pytest.approx(compared["layers"][0]["after_db"], rel=1e-4)
    assert found["command"].startswith("torch-quant quantize net:make --data inputs.npz")
    assert (tmp_path / "page.html").stat().st_size == found["bytes_written"]
    text = Path("bert.html").read_text(encoding="utf-8")
    kept = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert kept["metrics"] == [{"name": "accuracy", "float": 0.912, "quantized": 0.908}]
    assert kept["sensitivity"]["batches"] == 8


def test_report_says_what_cannot_be_written(tmp_path: Path) -> None:
    for arguments, message in (
        (["one-int8", "--out", str(tmp_path)], "it is a folder"),
        (["one-int8", "--out", "page.pdf"], "expected a name that ends in .html"),
        (["my-bert-int8"], "--overwrite to replace it"),
        (["my-bert"], "expected a folder that torch-quant quantize wrote"),
        (["one-int8", "--metric", "accuracy=1"], "as accuracy=0.912,0.908"),
    ):
        stderr = " ".join(run("report", *arguments, expect=2).stderr.split())
        assert message in stderr, stderr


@pytest.mark.parametrize("columns", [80, rarely(120)])
def test_reports_fit_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in (
        ["inspect", "my-bert-int8"],
        ["compare", "my-bert", "my-bert-int8", "--data", "texts.txt", "--samples", "1"],
        ["bench", "my-bert-int8", "--seconds", "0.01", "--backend", "onednn"],
    ):
        lines = run(*command).stdout.splitlines()
        assert max(map(len, lines)) <= columns, command


def test_names_are_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [each["name"] for each in data_of("inspect", "my-bert-int8")["sites"]]
    assert max(map(len, names)) > 40
    tables = (
        ["inspect", "my-bert-int8", "--all"],
        ["compare", "my-bert", "my-bert-int8", "--data", "texts.txt", "--samples", "1"],
    )
    for command in tables:
        monkeypatch.delenv("COLUMNS", raising=False)
        piped = run(*command).stdout
        assert all(f"\n{name} " in piped for name in names), command
        monkeypatch.setenv("COLUMNS", "80")
        folded = "".join(
            line.partition("   ")[0].strip() for line in run(*command).stdout.split("\n")
        )
        assert all(name in folded for name in names), command


def test_inspect_reads_what_the_package_saves(tmp_path: Path) -> None:
    quantizer = Quantizer("reference")
    model = torch.nn.Linear(8, 4)
    quantizer.calib(model)(torch.randn(16, 8))
    torch_quant.save(quantizer.quantize(model), tmp_path / "model")
    quantizer.save(tmp_path / "ranges")
    found = data_of("inspect", str(tmp_path / "model"))
    assert found["coverage"] == 1.0
    assert found["sites"][0]["range"] is None
    assert data_of("inspect", str(tmp_path / "ranges"))["calibration"]["batches"] == 1


def test_compare_finds_the_layer_where_the_error_comes_in() -> None:
    found = data_of("compare", "net:make", "one-int8", "--data", "inputs.npz", "--samples", "64")
    (layers,) = found["layers"].values()
    first, second = layers["layers"]
    assert first["share"] == 1.0
    assert first["before_db"] is None  # nothing was quantized before
    assert second["format"] == "float32"
    assert found["outputs"]["sqnr_db"] == pytest.approx(layers["outputs_db"], abs=1e-6)
    assert second["after_db"] == pytest.approx(layers["simulated_db"], abs=1e-3)
    same = data_of("compare", "one-int8", "one-int8", "--outputs-only")
    assert same["outputs"]["equal"]
    run("compare", "net:make", "one-int8", "--min-sqnr", "10", "--outputs-only")
    short = run("compare", "net:make", "one-int8", "--min-sqnr", "90", "--outputs-only", expect=4)
    assert "short of --min-sqnr 90" in short.stdout
    other = run("compare", "net:make", "my-llm-int8", "--data", "net:inputs", expect=1)
    assert "Traceback" not in other.stderr


def test_bench_calls_all_in_turns() -> None:
    found = data_of("bench", "one-int8", "--backend", "onednn", "--backend", "reference",
                    "--seconds", "0.01")  # fmt: skip
    assert [each["backend"] for each in found["runs"]] == [None, None, "onednn", "reference"]
    assert all(each["median_ms"] > 0 for each in found["runs"])
    assert found["inputs"] == "x: float32 [8, 32]"


def test_export_to_files(tmp_path: Path) -> None:
    x = Artifact("whole-int8").example()["x"]
    expected = Artifact("whole-int8").quant_model()(x)
    run("export", "whole-int8", "--to", "torchscript", "--out", str(tmp_path / "net.pt"))
    assert torch.equal(torch.jit.load(tmp_path / "net.pt")(x), expected)
    run("export", "whole-int8", "--to", "pt2", "--out", str(tmp_path / "net.pt2"))
    program = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.equal(program(x=x), expected)
    assert torch.equal(program(x=x[:3]), expected[:3])
    onnxruntime = pytest.importorskip("onnxruntime")
    run("export", "whole-int8", "--to", "onnx", "--out", str(tmp_path / "net.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {"x": x.numpy()})
    assert sqnr(expected, torch.from_numpy(found)) > 30.0
    held = data_of("inspect", str(tmp_path / "net.onnx"))
    assert held["left_out_by_onnxruntime"] == {}
    assert [each["quantized"] for each in held["sites"]] == [True, True]
    openvino = pytest.importorskip("openvino")
    made = data_of("export", "whole-int8", "--to", "openvino", "--out", str(tmp_path / "net.xml"))
    assert [Path(each).suffix for each in made["files"]] == [".xml", ".bin"]
    compiled = openvino.Core().compile_model(str(tmp_path / "net.xml"), "CPU")
    assert sqnr(expected, torch.from_numpy(compiled(x.numpy())[0])) > 30.0
    before = entries(tmp_path)
    run("export", "whole-int8", "--to", "openvino", "--out", str(tmp_path / "net.xml"), expect=2)
    assert entries(tmp_path) == before


@pytest.mark.long("a C++ compiler's time; tests/io/test_export_inductor.py is in every run")
@pytest.mark.filterwarnings("ignore")  # PyTorch's own, about how packages were loaded once
def test_export_to_a_compiled_package(tmp_path: Path) -> None:
    x = Artifact("whole-int8").example()["x"]
    expected = Artifact("whole-int8").quant_model()(x)
    run("export", "whole-int8", "--to", "inductor", "--out", str(tmp_path / "net.pt2"))
    (found,) = torch._inductor.aoti_load_package(str(tmp_path / "net.pt2"))(x)
    assert sqnr(expected, found) > 30.0


def test_a_checkpoint_writes_what_the_folder_writes(tmp_path: Path) -> None:
    for layout in ("compressed-tensors", "gptq"):
        out = str(tmp_path / layout)
        run("export", "my-llm-int8", "--to", layout, "--out", out)
        assert data_of("inspect", out)["kind"] == "checkpoint"
        loaded = torch_quant.load_checkpoint(out)
        ids = torch.arange(6)[None]
        expected = Artifact("my-llm-int8").quant_model()(ids).logits
        assert sqnr(expected, loaded(ids).logits) > 30.0
        config = json.loads((tmp_path / layout / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == layout
    said = data_of("generate", out, "--prompt", "the model", "--max-new-tokens", "4")
    ids = torch.tensor([said["tokens"]])
    model = AutoModelForCausalLM.from_pretrained("my-llm")
    prompt = torch.tensor([[2, 5]])  # "the", "model"
    expected = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert torch.equal(expected[:, 2:], ids)


@pytest.mark.long("three seconds: a whole decoder as a graph, and its file")
def test_rounded_codes_reach_an_onnx_file(tmp_path: Path) -> None:
    """A graph of the whole decoder would have them rounded again, to nearest."""
    onnxruntime = pytest.importorskip("onnxruntime")
    file = str(tmp_path / "int4.onnx")
    run("export", "my-llm-int4", "--to", "onnx", "--out", file)
    ids = Artifact("my-llm-int4").example()["input_ids"]
    expected = Artifact("my-llm-int4").quant_model()(ids).logits
    found = onnxruntime.InferenceSession(file).run(["logits"], {"input_ids": ids.numpy()})[0]
    assert sqnr(expected, torch.from_numpy(found)) > 25.0


def test_a_folder_of_something_else_is_no_checkpoint(tmp_path: Path) -> None:
    said = run("export", "one-int8", "--to", "gptq", "--out", str(tmp_path / "x"), expect=2).stderr
    assert "pt2 or torchscript" in " ".join(said.split())
    assert not entries(tmp_path)


def test_the_prompt_may_come_from_a_pipe() -> None:
    words = ("--prompt", "-", "--max-new-tokens", "2")
    found = run("generate", "my-llm-int8", *words, stdin="the cat")
    assert found.stdout.startswith("the cat ")
    assert "2 tokens in" in found.stdout


def test_a_checkpoint_of_static_int8_names_the_recipes_that_it_holds(tmp_path: Path) -> None:
    out = ("--to", "gptq", "--out", str(tmp_path / "x"))
    said = " ".join(run("export", "my-bert-int8", *out, expect=2).stderr.split())
    assert "--recipe int8_weight_only and int4_weight_only" in said
    assert not entries(tmp_path)
