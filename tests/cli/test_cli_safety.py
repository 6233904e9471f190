"""What the command line removes, overwrites, loads and calls good: nothing that it should not."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from commands import NET, Net, data_of, entries, run

from torch_quant_cli.data import Reading, batches

ROUNDING = ("quantize", "net:make", "--data", "net:inputs", "--recipe", "int4_weight_only",
            "-o", "group_size=32", "-o", "method=gptq", "--out", "int4")  # fmt: skip
MORE = """

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 4)

    def forward(self, x):
        return self.inner(x) * float("nan")


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 1)

    def forward(self, x):
        return self.inner(x).squeeze(-1)


def broken():
    torch.manual_seed(0)
    return Broken()


def flat():
    torch.manual_seed(0)
    return Flat()
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(NET + MORE)
    x = numpy.random.default_rng(0).standard_normal((64, 32)).astype("float32")
    numpy.savez(tmp_path / "inputs.npz", x=x)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_folder_beside_the_output_is_removed_by_what_rounded_there_alone() -> None:
    mine = Path("int4.unfinished")
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    assert "holds thesis.txt" in " ".join(run(*ROUNDING, expect=2).stderr.split())
    data_of("quantize", "net:make", "--recipe", "int8_dynamic", "--data", "net:inputs",
            "--out", "int4")  # fmt: skip
    assert (mine / "thesis.txt").read_text() == "mine"
    (mine / "thesis.txt").unlink()
    data_of(*ROUNDING, "--overwrite")
    assert not mine.exists()


def test_a_goal_that_held_out_samples_miss_is_missed() -> None:
    x = numpy.load("inputs.npz")["x"]
    x[8:] *= 30.0  # far out of the calibrated ranges
    numpy.savez("growing.npz", x=x)
    how = ("--data", "growing.npz", "--samples", "8", "--recipe", "fast", "--out", "int8")
    said = run("quantize", "net:make", *how, "--min-sqnr", "15", expect=4).stdout
    assert "that calibration did not see" in said
    assert "--min-sqnr 15 is not reached" in said


def test_outputs_of_nan_are_not_equal_and_reach_no_goal() -> None:
    command = ("quantize", "net:broken", "--data", "inputs.npz", "--recipe", "fast")
    said = run(*command, "--out", "a").stdout
    assert "SQNR nan dB" in said
    assert "equal" not in said
    found = data_of("compare", "net:broken", "a", "--outputs-only", "--min-sqnr", "1", expect=4)
    assert found["outputs"] == {"sqnr_db": None, "equal": False, "cosine": None}


def test_outputs_without_rows_have_no_cosine() -> None:
    run("quantize", "net:flat", "--data", "inputs.npz", "--recipe", "fast", "--out", "a")
    said = run("compare", "net:flat", "a", "--outputs-only").stdout
    assert "SQNR" in said
    assert "cosine" not in said


def test_overwriting_spares_what_the_command_did_not_write(home: Path) -> None:
    command = ("quantize", "net:make", "--data", "inputs.npz", "--recipe", "fast", "--out", "a")
    run(*command)
    (home / "a" / "notes.md").write_text("mine")
    assert "notes.md" in run(*command, "--overwrite", expect=2).stderr
    (home / "a" / "notes.md").unlink()
    run(*command, "--overwrite")
    inside = ("quantize", "net:make", "--recipe", "fast", "--overwrite", "--out", ".")
    os.chdir("a")
    run(*inside, "--data", "../inputs.npz")
    os.chdir(home)
    assert "torch-quant.json" in entries(home / "a")
    (home / "link").symlink_to("linked")
    run(*command[:-1], "link")
    assert "torch-quant.json" in entries(home / "linked")
    assert (home / "link").is_symlink()


def test_what_a_killed_overwrite_moved_away_is_there_again(home: Path) -> None:
    command = ("quantize", "net:make", "--data", "inputs.npz", "--recipe", "fast", "--out", "a")
    run(*command)
    stage = home / ".a.json.torch_quant-x1"
    stage.mkdir()
    os.replace("a", stage / "earlier")
    assert "--out a exists" in run(*command, expect=2).stderr
    assert "model.json" in entries(home / "a")
    assert not stage.exists()


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("evil",)


def test_a_program_with_code_in_it_is_refused(home: Path) -> None:
    program = torch.export.export(Net().eval(), (torch.randn(8, 32),))
    torch.export.save(program, "good.pt2")
    with zipfile.ZipFile("good.pt2") as old, zipfile.ZipFile("bad.pt2", "w") as new:
        for name in old.namelist():
            if name.endswith("sample_inputs/model.pt"):
                torch.save(((Evil(),), {}), "evil.pt")
                new.writestr(name, Path("evil.pt").read_bytes())
            else:
                new.writestr(name, old.read(name))
    arguments = ("--data", "inputs.npz", "--recipe", "fast", "--out", "int8")
    said = " ".join(run("quantize", "bad.pt2", *arguments, expect=2).stderr.split())
    assert "sample_inputs/model.pt in it holds more than tensors" in said
    assert not (home / "evil").exists()
    run("quantize", "good.pt2", *arguments)


def test_the_function_of_a_folder_is_named_before_it_is_called() -> None:
    made = run("quantize", "net:make", "--data", "inputs.npz", "--recipe", "fast", "--out", "a")
    assert "is called" not in made.stderr
    said = run("bench", "a", "--seconds", "0.01", "--backend", "reference").stderr
    assert said.count("names net:make, which is called") == 1


def test_no_sample_behind_those_asked_for_calibrates() -> None:
    found = data_of("quantize", "net:make", "--data", "inputs.npz", "--samples", "1",
                    "--recipe", "fast", "--out", "a")  # fmt: skip
    assert found["samples"] == 1
    assert found["outputs"]["held_out"]
    assert found["settings"]
    sizes = [len(x["x"]) for x in batches("inputs.npz", Net(), None, Reading(30, cut=10))]
    assert sizes == [8, 2, 8, 8, 4]


def test_lines_are_those_of_the_file() -> None:
    row = "[" + ", ".join(["1.0"] * 32) + "]"
    text = f'\ufeff{{"x": {row}, "note": "a\u2028b"}}\r\n{{"x": {row}, "note": "c"}}\n'
    Path("rows.jsonl").write_bytes(text.encode())

    class Noted(Net):
        def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
            return super().forward(x)

    with pytest.raises(Exception, match="line 1: no numbers"):  # and not: no JSON
        batches("rows.jsonl", Noted(), None, Reading())
