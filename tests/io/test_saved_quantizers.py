"""``Quantizer.save`` and ``load``: everything comes back, and bad folders are refused by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from extending import kept_registries
from flows import calibrated
from models import MODELS, example
from thinning import LONG
from torch import nn

from torch_quant import InvalidConfig, ModuleFilter, QConfig, Quantizer, QuantSpec, SmoothQuant
from torch_quant.io.folder import VERSION, read_folder, write_folder
from torch_quant.statistics import OBSERVERS, Statistic, register_statistic

X = example("attention_explicit", 16)


def made(**options: Any) -> tuple[nn.Module, Quantizer]:
    model = MODELS["attention_explicit"]()
    return model, calibrated(model, [(X, {})], backend="reference", **options)


def text_of(quantizer: Quantizer) -> str:
    return str(quantizer.state_dict()) + str(quantizer.to_config())


OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"qconfig": QConfig(observer=name)} for name in OBSERVERS},
    "smooth": {"qconfig": QConfig(transforms=[SmoothQuant(0.6)])},
    "settings": {
        "overrides": {"op:linear": QConfig(weight=QuantSpec.of("int4", per_channel=True))},
        "module_filter": ModuleFilter(exclude_op_types="matmul"),
        "unseen_calls": "error",
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_everything_comes_back(name: str, tmp_path: Path) -> None:
    model, quantizer = made(**OPTIONS[name])
    expected = quantizer.quantize(model)(*X)
    quantizer.save(tmp_path / "ranges")
    assert sorted(each.suffix for each in (tmp_path / "ranges").iterdir()) == [
        ".json", ".safetensors"
    ]  # fmt: skip
    again = Quantizer.load(tmp_path / "ranges")
    assert text_of(again) == text_of(quantizer)
    assert torch.equal(again.quantize(model, example_inputs=X)(*X), expected)
    assert dict(again.plan) == dict(quantizer.plan)


def test_fallback_and_an_edited_summary_come_back(tmp_path: Path) -> None:
    model, quantizer = made()
    quantizer.fallback(_amp(quantizer, model), num=1)
    quantizer.quantize(model)
    quantizer.save_summary(tmp_path / "summary.json")
    edited = json.loads((tmp_path / "summary.json").read_text())
    site = next(each for each in edited["sites"] if each["quantized"])
    site |= {"quantized": False, "reason": "by hand"}
    (tmp_path / "summary.json").write_text(json.dumps(edited))
    quantizer.load_summary(tmp_path / "summary.json")
    expected = quantizer.quantize(model)(*X)
    quantizer.save(tmp_path / "ranges")
    again = Quantizer.load(tmp_path / "ranges")
    assert torch.equal(again.quantize(model, example_inputs=X)(*X), expected)
    assert again.plan[site["name"]].reason == "by hand"
    assert dict(again.plan) == dict(quantizer.plan)


def _amp(quantizer: Quantizer, model: nn.Module) -> Any:
    amp_model = quantizer.amp(model)
    amp_model(*X)
    return amp_model


def test_calibration_goes_on_after_loading_and_saving_again_replaces(tmp_path: Path) -> None:
    model, quantizer = made()
    quantizer.save(tmp_path)
    (first,) = tmp_path.glob("*.safetensors")
    again = Quantizer.load(tmp_path)
    again.calib(model)(*(10.0 * x for x in X))
    again.save(tmp_path)
    (second,) = tmp_path.glob("*.safetensors")
    assert first.name != second.name
    assert Quantizer.load(tmp_path).state.batches == 2


def test_what_is_no_data_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    quantizer = Quantizer("reference", overrides={lambda site: True: None})
    with pytest.raises(InvalidConfig, match="is a function, which is no data"):
        quantizer.save(tmp_path / "ranges")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "message"),
    [("", "give a folder"), ("a/b/c", "No such file"), ("file", "it is a file"), (3, "give a fol")],
)
def test_bad_paths(path: Any, message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    with pytest.raises(InvalidConfig, match=message):
        Quantizer("reference").save(path)


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "quantizer.json"
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    return apply


def cut(suffix: str, keep: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (file,) = folder.glob(f"*{suffix}")
        whole = file.read_bytes()
        file.write_bytes(whole[: int(keep * len(whole))])

    return apply


def flip(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 1
    file.write_bytes(bytes(whole))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("json", 0.7), "quantizer.json is truncated"),
        (cut("json", 0.0), "quantizer.json is truncated"),
        (cut("safetensors", 0.7), "safetensors is truncated or was changed"),
        (flip, "safetensors is truncated or was changed"),
        (
            edit(lambda d: d.update(version=VERSION + 1)),
            f"version {VERSION + 1}, of torch_quant .*install the newer",
        ),
        (edit(lambda d: d.update(version="1")), "version '1'"),
        (edit(lambda d: d.update(format="torch_quant model")), "its format is 'torch_quant model'"),
        (edit(lambda d: d.clear()), "its format is None"),
        (edit(lambda d: d["quantizer"]["settings"].update(x="float32")), "was changed after"),
        (edit(lambda d: d["tensors"].update(file="../x")), "was changed after"),
        (lambda folder: (folder / "quantizer.json").unlink(), "cannot read .*quantizer.json"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "is not beside it"),
        (lambda folder: (folder / "quantizer.json").write_bytes(b"\xff\xfe"), "no file of torch"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(damage: Any, message: str, tmp_path: Path) -> None:
    made()[1].save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InvalidConfig, match=message):
        Quantizer.load(tmp_path)


def test_tensors_keep_strides_names_and_values(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 5)
    tensors = {
        "plain": x, "again": x, "last": x.to(memory_format=torch.channels_last), "t": x[0, 0].t(),
        "wide": x[:1].expand(3, 3, 4, 5), "complex": torch.randn(2, 2, dtype=torch.complex64).t(),
        "bf16": x.bfloat16(), "int8": x.to(torch.int8), "f8": x.to(torch.float8_e4m3fn),
        "none": torch.zeros(0, 3), "one": torch.tensor(2.5), "part": x[:, 1:2], "flag": x > 0,
    }  # fmt: skip
    write_folder(tmp_path, "quantizer", {"a": 1}, tensors)
    data, found = read_folder(tmp_path, "quantizer")
    assert data == {"a": 1}
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype
        same = found[name].float() if name == "f8" else found[name]
        assert torch.equal(same, x.float() if name == "f8" else x), name
    assert found["plain"] is found["again"]
    for name in ("last", "t", "complex"):
        assert found[name].stride() == tensors[name].stride()


@pytest.mark.parametrize(
    "x", [torch.ones(2).to_sparse(), torch.empty(2, device="meta")], ids=["sparse", "meta"]
)
def test_tensors_without_a_form_are_named(x: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="the tensor strange is"):
        write_folder(tmp_path / "new", "quantizer", {}, {"strange": x})
    assert not (tmp_path / "new").exists()


KILLED = """
import sys, torch
from torch_quant.io.folder import write_folder
i = 0
while True:
    i += 1
    write_folder(sys.argv[1], "quantizer", {"turn": i}, {"x": torch.full((1 << 18,), float(i))})
    print(i, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX: run on Linux or macOS")
def test_a_kill_while_saving_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    for turn in range(3) if LONG else (2,):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.03 * turn)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        data, tensors = read_folder(tmp_path, "quantizer")
        assert float(tensors["x"][0]) == float(tensors["x"][-1]) == data["turn"]
    write_folder(tmp_path, "quantizer", {}, {"x": torch.ones(1)})
    assert len(list(tmp_path.iterdir())) == 2


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "tensors-of-mine.safetensors").write_text("mine")
    (tmp_path / "notes.json").write_text("[]")
    quantizer = made()[1]
    for _ in range(2):
        quantizer.save(tmp_path)
    assert (tmp_path / "tensors-of-mine.safetensors").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 4


def test_saves_at_once_leave_a_whole_one(tmp_path: Path) -> None:
    """Models and quantizers, by several threads, into one folder."""

    def write(kind: str, number: int) -> None:
        for turn in range(6):
            x = torch.full((1 << 12,), float(100 * number + turn))
            write_folder(tmp_path, kind, {"value": float(x[0])}, {"x": x})

    threads = [
        threading.Thread(target=write, args=(kind, number))
        for number in range(2)
        for kind in ("quantizer", "model")
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for kind in ("quantizer", "model"):
        data, tensors = read_folder(tmp_path, kind)
        assert float(tensors["x"][0]) == data["value"]
    # One file where both hold the same.
    assert len(list(tmp_path.glob("*.safetensors"))) <= 2


class Plain(Statistic):
    """Keeps values that JSON has no form for."""

    name = "plain"

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Any] = {}

    def observe(self, x: torch.Tensor) -> None:
        self.kept = {"inf": float("inf"), "pair": (1, 2), "dtype": x.dtype, "tensor": "float32"}
        self.batches += 1

    def _merge(self, other: Plain) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "kept": self.kept}

    def load_state_dict(self, state: Any) -> None:
        self.batches, self.kept = state["batches"], state["kept"]


def test_every_plain_value_of_a_statistic_comes_back(tmp_path: Path) -> None:
    with kept_registries():
        register_statistic(Plain)
        quantizer = made()[1]
        statistic = Plain()
        statistic.observe(torch.ones(2))
        quantizer.state.put("x", "plain", statistic)
        quantizer.fallen_back = {"tensor": "float32"}
        quantizer.save(tmp_path)
        again = Quantizer.load(tmp_path)
    found = again.state.find("x", "plain")
    assert isinstance(found, Plain)
    assert found.kept == statistic.kept
    assert again.fallen_back == {"tensor": "float32"}
