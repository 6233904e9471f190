"""What ``torch_quant.save`` and ``load`` refuse, and what they say of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flows import calibrated
from models import MODELS, example, normal, seeded
from test_saved_models import Branches, saved
from torch import Tensor, nn

import torch_quant
from torch_quant import InvalidConfig, Quantizer, load, save
from torch_quant.backends import Backend
from torch_quant.io.folder import _checksum


def test_what_is_no_quantized_model(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(InvalidConfig, match=r"expected the model that quantizer.quantize.*Linear"):
        save(model, tmp_path / "x")
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    calib_model(normal(4, 4))
    with pytest.raises(InvalidConfig, match="expected the model that"):
        save(calib_model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = MODELS["small_cnn"]()
    saved(model, [(example("small_cnn", 4), {})], tmp_path, backend="reference")
    for other in (MODELS["mlp"](), nn.Linear(4, 2)):
        with pytest.raises(InvalidConfig, match=r"does not fit the saved one: .* expected a "):
            load(tmp_path, other)
    with pytest.raises(InvalidConfig, match="got str"):
        load(tmp_path, "small_cnn")  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="quantized already"):
        load(tmp_path, load(tmp_path))


def test_shared_weights_and_objects_with_tensors_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 256), nn.Linear(256, 256)).requires_grad_(False)
    quantizer = calibrated(
        model, [((normal(8, 16),), {})], backend="reference", overrides={"1": None}
    )
    shared = quantizer.quantize(model, share_float_weights=True)
    with pytest.raises(InvalidConfig, match="share_float_weights=False"):
        save(shared, tmp_path / "x")

    class Listed(Branches):
        def __init__(self) -> None:
            super().__init__()
            self.kept = [SimpleNamespace(ones=torch.ones(4))]

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.kept[0].ones

    model, x = seeded(Listed), normal(8, 8)
    quant_model = calibrated(model, [((x,), {})], backend="reference").quantize(model)
    with pytest.raises(
        InvalidConfig,
        match=r"kept, of builtins\.list, holds tensors beside .* of types\.SimpleNamespace",
    ):
        save(quant_model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_backend_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(MODELS["mlp"](), [(example("mlp", 8), {})], tmp_path, backend="onednn")
    onednn = type(Backend.get("onednn"))
    monkeypatch.setattr(onednn, "unavailable", lambda self: "no oneDNN in this build")
    with pytest.raises(torch_quant.BackendUnavailable, match="no oneDNN in this build"):
        load(tmp_path)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changed by somebody who forges the checksum too."""
    file = folder / "model.json"
    data = json.loads(file.read_text())
    change(data["model"])
    data["sha256"] = _checksum(data)
    file.write_text(json.dumps(data))


def root(data: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = data["modules"][""]
    return found


MARK = "tampered"


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.clear(),
        lambda d: d["modules"].pop(""),
        lambda d: d["modules"].update({"": 3}),
        lambda d: root(d).update(children=["..", 5]),
        lambda d: root(d).update(children=["nobody"]),
        lambda d: root(d).update(parameters={"x": True}),
        lambda d: root(d).update(buffers=[1]),
        lambda d: root(d).update(nests={"x": [{"node": "tensor.0"}]}),
        lambda d: root(d).update(nests={"x": {"node": "module.0"}}),
        lambda d: root(d).update(nests={"forward": [1]}),
        lambda d: root(d).update(nests={"_modules": {"dict": []}}),
        lambda d: root(d).update(nests={"_forward_hooks": {"dict": [[0, 5]]}}),
        lambda d: root(d).update(nests={"training": [1]}),
        lambda d: root(d).update(nests={"_load_state_dict_post_hooks": [1]}),
        lambda d: root(d).update(nests={"_stands_for": [1]}),
        lambda d: root(d).update(nests={"quantization": [1]}),
        lambda d: root(d).update(nests=[1]),
        lambda d: root(d).pop("runs"),
        lambda d: root(d).update(runs=None),
        lambda d: root(d)["runs"].update(backend="os"),
        lambda d: root(d)["runs"].update(backend=["onednn"]),
        lambda d: root(d)["runs"].update(signature={"decorated": 1, "parameters": [["x"]]}),
        lambda d: root(d)["runs"].update(
            signature={
                "decorated": False,
                "parameters": [["x=print()", "VAR_KEYWORD", False, None]],
            }
        ),
        lambda d: root(d)["runs"].update(graphs=[{}]),
        lambda d: root(d)["runs"].update(graphs=3),
        lambda d: root(d)["runs"]["graphs"][0].update(plan=[]),
        lambda d: root(d)["runs"]["graphs"][0]["graph"]["nodes"].append(["call_module"]),
        lambda d: root(d)["runs"]["graphs"][0].update(outputs=None),
        lambda d: root(d)["runs"]["graphs"][0].update(calls={"nest": None}),
        lambda d: root(d)["runs"]["graphs"][0].update(compiled="os.system"),
        lambda d: root(d)["runs"].update(plan={"sites": [{"name": 1}]}),
        lambda d: d["modules"].update({"": {"same": ""}}),
    ],
)
def test_forged_data_are_refused(change: Any, tmp_path: Path) -> None:
    saved(MODELS["mlp"](), [(example("mlp", 8), {})], tmp_path, backend="reference")
    rewritten(tmp_path, change)
    with pytest.raises(torch_quant.QuantError):
        load(tmp_path)


def test_folders_from_before_attributes_could_hold_tensors_are_read(tmp_path: Path) -> None:
    quant_model = saved(MODELS["mlp"](), [(example("mlp", 8), {})], tmp_path, backend="reference")

    def older(data: dict[str, Any]) -> None:
        for module in data["modules"].values():
            module.pop("nests", None)

    rewritten(tmp_path, older)
    (x,) = example("mlp", 8)
    assert torch.equal(load(tmp_path)(x), quant_model(x))
