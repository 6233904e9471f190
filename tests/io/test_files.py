"""Paths are checked before any work, and a writer that was killed leaves nothing for long."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flows import calibrated
from models import example, mlp

from torch_quant import Backend, InvalidConfig, export_onnx, export_torchscript
from torch_quant.amp.gram import NoiseGram
from torch_quant.amp.ranking import Ranking
from torch_quant.amp.report import SensitivityReport
from torch_quant.io.files import new_folder, write_atomically

WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda folder: "", "the path ''"),
    "dot": (lambda folder: ".", "it is a folder; give a file in it"),
    "folder": (lambda folder: folder, "it is a folder; give a file in it, as '.*model.pt'"),
    "slash": (lambda folder: f"{folder}/new/", "it is a folder"),
    "missing": (lambda folder: folder / "absent" / "m", "there is no folder .*absent; give a"),
    "below_a_file": (lambda folder: Path(__file__) / "m", "there is no folder .*test_files.py"),
    "device": (lambda folder: os.devnull, "it is no regular file"),
    "long": (lambda folder: folder / ("m" * 300), "File name too long"),
    "none": (lambda folder: None, "the path None"),
    "number": (lambda folder: 3, "the path 3"),
}

Writer = Callable[[Any], Any]


def _quantized(backend: str) -> Any:
    model = mlp()
    return calibrated(model, [(example("mlp", 16), {})], backend=backend).quantize(model)


def _idle(quant_model: Any) -> Any:
    def called(*_: Any) -> None:
        raise AssertionError("the path was not checked first")

    quant_model.register_forward_pre_hook(called)
    return quant_model


def _torchscript() -> Writer:
    quant_model = _idle(_quantized("reference"))
    return lambda path: export_torchscript(quant_model, example("mlp", 2), path)


def _onnx() -> Writer:
    if reason := Backend.ONNX.unavailable():
        pytest.skip(reason)
    quant_model = _idle(_quantized("onnx"))
    return lambda path: export_onnx(quant_model, example("mlp", 2), path)


def _summary() -> Writer:
    model = mlp()
    quantizer = calibrated(model, [(example("mlp", 16), {})], backend="reference")
    quantizer.quantize(model)
    return quantizer.save_summary


def _report() -> SensitivityReport:
    return SensitivityReport(Ranking([], "output", NoiseGram(), 0.0, 1))


WRITERS: dict[str, Callable[[], Writer]] = {
    "torchscript": _torchscript,
    "onnx": _onnx,
    "summary": _summary,
    "json": lambda: _report().to_json,
    "csv": lambda: _report().to_csv,
    "plot": lambda: _report().plot,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_paths_that_will_not_do(writer: str, tmp_path: Path) -> None:
    write = WRITERS[writer]()
    for name, (path, message) in WRONG.items():
        if (writer, name) == ("plot", "none"):
            continue  # it shows the figure
        wanted = message.replace("model.pt", "figure.png") if writer == "plot" else message
        with pytest.raises(InvalidConfig, match=f"cannot write .*{wanted}"):
            write(path(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_may_not_be_written_to(writer: str, tmp_path: Path) -> None:
    write = WRITERS[writer]()
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InvalidConfig, match="may not be written to; give a writable folder"):
            write(tmp_path / "m")
    finally:
        tmp_path.chmod(0o700)


# Writers that are killed, and such that are not


FORKS = multiprocessing.get_context("fork")
forking = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def _write(path: Path, half: Any, rest: Any) -> None:
    def write(name: str) -> None:
        Path(name).write_text("half")
        half.set()
        rest.wait()

    write_atomically(path, write)


def _writing(path: Path) -> tuple[Any, Any]:
    """A process in the middle of writing, and what lets it write the rest."""
    half, rest = FORKS.Event(), FORKS.Event()
    process = FORKS.Process(target=_write, args=(path, half, rest))
    process.start()
    assert half.wait(60)
    return process, rest


@forking
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path, other = tmp_path / "m.ts", tmp_path / ".m.ts.swp"
    other.write_text("of an editor")
    process, _ = _writing(path)
    process.kill()
    process.join()
    (left,) = (each for each in tmp_path.iterdir() if each != other)
    assert left.name.startswith(".m.ts.torch_quant-")
    write_atomically(tmp_path / "m", lambda name: Path(name).write_text("of another path"))
    assert left.exists()
    write_atomically(path, lambda name: Path(name).write_text("new"))
    assert path.read_text() == "new"
    assert {each.name for each in tmp_path.iterdir()} == {"m", "m.ts", ".m.ts.swp"}


@forking
def test_a_writer_at_the_same_time_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.ts"
    process, rest = _writing(path)
    write_atomically(path, lambda name: Path(name).write_text("new"))
    assert len(list(tmp_path.iterdir())) == 2
    rest.set()
    process.join()
    assert process.exitcode == 0
    assert path.read_text() == "half"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, InvalidConfig), (errno.EIO, OSError)]
)
def test_a_writer_that_fails_leaves_the_old_file(
    number: int, expected: type[Exception], tmp_path: Path
) -> None:
    path = tmp_path / "m.ts"
    path.write_text("old")

    def fail(name: str) -> None:
        Path(name).write_text("half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(expected, match=r"No space left on device; what .* unchanged|output error$"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# Folders that take the place of others


@pytest.mark.parametrize("interrupted", [0, 1])
@pytest.mark.parametrize("moved", [False, True], ids=["before", "after"])
def test_an_interruption_of_a_replacement_loses_no_folder(
    interrupted: int, moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or after either of the two steps."""
    target = tmp_path / "int8"
    target.mkdir()
    (target / "a").write_text("old")
    replace, calls = os.replace, 0

    def stopped(source: Any, place: Any) -> None:
        nonlocal calls
        calls += 1
        if moved or calls != interrupted + 1:
            replace(source, place)
        if calls == interrupted + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt), new_folder(target, replace=True) as made:
        (made / "a").write_text("new")
    expected = "new" if moved and interrupted else "old"
    assert (target / "a").read_text() == expected
    assert list(tmp_path.iterdir()) == [target]


def test_what_cannot_be_put_back_stays_for_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "int8"
    target.mkdir()
    (target / "a").write_text("old")
    replace = os.replace

    def failing(source: Any, place: Any) -> None:
        if Path(place) == target:
            raise OSError(5, "Input/output error")
        replace(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="Input/output"), new_folder(target, replace=True):
            pass
    assert not target.exists()
    with new_folder(target, replace=True):
        assert (target / "a").read_text() == "old"


def test_what_a_killed_replacement_moved_away_is_put_back(tmp_path: Path) -> None:
    target, stage = tmp_path / "int8", tmp_path / ".int8.json.torch_quant-1"
    (stage / "earlier").mkdir(parents=True)
    (stage / "earlier" / "a").write_text("old")
    with pytest.raises(InvalidConfig, match="exists already"), new_folder(target):
        pass
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
