"""``capture=``: the whole model, each module with a weight, or named modules as graphs."""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import BACKENDS, assert_unchanged, calibrated, equal, snapshot
from models import normal, seeded, tokens
from test_decoding import HEADS, VOCABULARY, _causal
from test_generate import MODELS, generated, taught
from torch import Tensor, nn

from torch_quant import CaptureFailed, InvalidConfig, QConfig, Quantizer, recipes, sqnr
from torch_quant.config import RECIPES

DEEP = {"num_hidden_layers": 12, **HEADS, "use_cache": False}


class Bare(nn.Module):
    """A layer of the user's own, which computes with its weight directly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(width, width) * 0.2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x @ self.kernel * scale


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), Bare(16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.first(x).relu(), scale=0.5) + x)


class Net(nn.Module):
    """Python that no graph can hold, around layers of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(32, 16), nn.Conv1d(16, 16, 3, padding=1)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.table = nn.Parameter(torch.randn(16, 16) * 0.2)
        self.head = nn.Linear(16, 4)
        self.seen: list[int] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.seen.append(len(ids))
        x = self.conv(self.embed(ids).mT).mT
        x, _ = self.lstm(x)
        for block in self.blocks:
            x = block(x)
        if float(x.abs().max()) > 1e6:
            x = x / 2
        return self.head(nn.functional.linear(x, self.table)) * min(len(self.seen), 3)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_modules_are_graphs_and_the_rest_is_python(backend: str) -> None:
    model = seeded(Net).eval()
    before, fresh = snapshot(model), copy.deepcopy(model)
    quantizer = Quantizer(backend, capture="modules")
    calib_model: Any = quantizer.calib(model)
    for batch in (2, 5, 1):
        ids = tokens(batch, 7, 32)
        assert equal(calib_model(ids), fresh(ids))
    assert_unchanged(model, before)
    assert model.seen == []  # the proxy keeps a list of its own
    assert calib_model.seen == [2, 5, 1]
    layers = {f"blocks.{i}.{x}" for i in "01" for x in ("first", "second")}
    names = {"embed", "conv", "head", *layers}
    quant_model: Any = quantizer.quantize(model)
    assert names <= set(quantizer.plan)
    assert set(quantizer.plan) <= {*names, "lstm"}
    assert quant_model.seen == []
    ids = tokens(3, 7, 32)
    assert sqnr(copy.deepcopy(model)(ids), quant_model(ids)) > 20
    assert isinstance(quant_model.blocks[0], Block)
    assert type(quant_model.blocks[0].norm) is nn.LayerNorm
    report = str(quantizer.coverage(model))
    assert "capture='modules'" in report
    assert "mm" in {op.op for op in quantizer.coverage(model).plan.float_ops}  # with the table
    assert torch.equal(quant_model.table, model.table)


@torch.no_grad()
def test_named_modules_are_a_graph_each() -> None:
    model = seeded(Net).eval()
    ids, expected = tokens(4, 7, 32), copy.deepcopy(model)
    quantizer = Quantizer("reference", capture=["blocks.*", "head"])
    calib_model = quantizer.calib(model)
    assert equal(calib_model(ids), expected(ids))
    submodule = calib_model.captured.root
    assert set(submodule.children) == {"blocks.0", "blocks.1", "head"}
    assert all(len(each.graphs) == 1 for each in submodule.children.values())
    quantizer.quantize(model)
    assert set(quantizer.plan) == {
        "head",
        *(f"blocks.{i}.{x}" for i in "01" for x in ("first", "second")),
    }
    again = Quantizer("reference", capture=["blocks"])  # a list of layers, each a graph
    again.calib(model, example_inputs=ids)
    assert set(again.calib(model).captured.root.children) == {"blocks.0", "blocks.1"}


@torch.no_grad()
def test_fallback_coverage_and_unseen_calls(caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(
        lambda: nn.Sequential(nn.Linear(16, 16), Bare(16), nn.Linear(16, 16), Bare(16))
    ).eval()
    x = normal(8, 16)
    quantizer = calibrated(model, [((x,), {})], backend="reference", capture="modules")
    amp_model = quantizer.amp(model)
    assert equal(amp_model(x), model(x))
    worst = quantizer.fallback(amp_model, num=1)
    quant_model = quantizer.quantize(model)
    assert set(quantizer.plan) - set(quantizer.plan.quantized) == set(worst)
    assert quantizer.coverage(model).share == pytest.approx(0.75)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        longer = quant_model(normal(2, 3, 16))  # of another rank
    assert longer.shape == (2, 3, 16)
    assert not [each for each in caplog.records if each.name == "torch_quant"]
    strict = calibrated(
        model, [((x,), {})], backend="reference", capture="modules", unseen_calls="error"
    ).quantize(model)
    with pytest.raises(CaptureFailed, match="1 was quantized for other inputs"):
        strict(normal(2, 3, 16))


@pytest.mark.parametrize("name", ["llama", "t5"])
@torch.no_grad()
def test_generates(name: str) -> None:
    model, inputs = taught(name)
    expected = generated(model, inputs)
    quantizer = Quantizer("reference", capture="modules")
    assert torch.equal(generated(quantizer.calib(model), inputs), expected)
    for backend in sorted({"reference", "onednn"} & set(BACKENDS)):
        quant_model = quantizer.quantize(model, backend=backend)
        assert torch.equal(generated(quant_model, inputs), expected)


@torch.no_grad()
def test_layers_of_one_make_are_exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_quant.graph import capture

    exported: list[str] = []
    export = capture.export_call

    def noted(module: nn.Module, *args: Any, path: str, **options: Any) -> Any:
        exported.append(path)
        return export(module, *args, path=path, **options)

    monkeypatch.setattr(capture, "export_call", noted)
    model = seeded(lambda: nn.Sequential(*[Block() for _ in range(4)], Bare(16))).eval()
    model[2].second.kernel.mul_(3)  # other values, the same make
    model[3].second.register_forward_hook(lambda module, args, out: out * 2)  # around it
    x = normal(8, 16)
    calib_model = Quantizer("reference", capture="modules").calib(model)
    assert equal(calib_model(x), model(x))
    assert exported == ["0.second", "4"]  # of "4" the call has no scale


@pytest.mark.long("two captures of a deep model")
@torch.no_grad()
def test_a_deep_decoder_takes_a_fraction_of_the_time() -> None:
    model, ids = _causal("LlamaForCausalLM", **DEEP)(), tokens(2, 9, VOCABULARY)
    Quantizer("reference").calib(seeded(Block), normal(2, 16))  # what only the first export costs
    taken: dict[str, float] = {}
    for choice in ("modules", "whole"):
        quantizer = Quantizer("reference", capture=choice)
        calib_model = quantizer.calib(model)
        start = time.process_time()
        assert torch.equal(calib_model(input_ids=ids).logits, model(input_ids=ids).logits)
        taken[choice] = time.process_time() - start
        quantizer.quantize(model)
        assert len([s for s in quantizer.plan.quantized if quantizer.plan[s].op == "linear"]) == 85
    # 9 % on a quiet machine; what else runs there makes it waver.
    assert taken["modules"] < 0.2 * taken["whole"]


def test_wrong_choices() -> None:
    for wrong in ("module", [], [""], 3, False):
        with pytest.raises(InvalidConfig, match='expected "whole", "modules", or a list of names'):
            Quantizer("reference", capture=wrong)  # type: ignore[arg-type]
    model = seeded(Net).eval()
    with pytest.raises(InvalidConfig, match=r"capture= 'block' matches nothing.*blocks"):
        Quantizer("reference", capture=["block"]).calib(model)


@torch.no_grad()
def test_what_needs_no_ranges_is_captured_by_modules() -> None:
    """Unless the user says otherwise; coverage counts what is then in float, as of one graph."""
    build, ids = MODELS["llama"], tokens(2, 7, VOCABULARY)
    recipe = recipes.int4_weight_only(group_size=32)
    reports = {}
    for choice in (None, "modules", "whole"):
        model = build()
        quantizer = Quantizer(recipe, backend="reference", capture=choice)
        quant_model = quantizer.quantize(model, example_inputs={"input_ids": ids})
        assert sqnr(model(ids).logits, quant_model(ids).logits) > 8.0
        reports[choice] = quantizer.coverage(model)
    assert dict(reports[None].plan) == dict(reports["modules"].plan)
    assert "capture='modules' is the default where activations need no ranges" in str(reports[None])
    assert not reports["whole"].glue
    assert reports[None].plan.macs == reports["whole"].plan.macs
    assert reports[None].share == reports["whole"].share < 1.0  # attention's products
    static = Quantizer("reference")
    calib_model: Any = static.calib(build())
    calib_model(ids)
    assert len(calib_model.captured.root.graphs) == 1


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_default_follows_the_formats(name: str) -> None:
    whole = name in ("int8_static", "fast", "float8", "bfloat16")  # ranges, or bfloat16
    quantizer = Quantizer(RECIPES[name](), backend="reference", overrides={"0": QConfig()})
    assert ("capture='modules'" in repr(quantizer)) == (not whole)
    assert "capture" not in quantizer.to_config()
    model = seeded(Parts).eval()
    calib_model = Quantizer(RECIPES[name](), backend="reference").calib(model, normal(2, 8))
    assert bool(calib_model.captured.root.graphs) == whole


def test_an_explicit_choice_is_kept(tmp_path: Path) -> None:
    model, x = seeded(Parts).eval(), normal(2, 8)
    quantizer = Quantizer(recipes.int8_dynamic(), backend="reference", capture="whole")
    for each in (quantizer, Quantizer.from_config(quantizer.to_config())):
        assert "capture='whole'" in repr(each)
        quant_model = each.quantize(model, example_inputs=x)
        assert len(quant_model.graphs) == 1
        each.save(tmp_path / "ranges")
    again = Quantizer.load(tmp_path / "ranges")
    assert again.to_config() == quantizer.to_config()
    assert torch.equal(again.quantize(model, example_inputs=x)(x), quant_model(x))


def test_is_data_and_shown() -> None:
    for choice in ("modules", ["encoder", "head.*"]):
        quantizer = Quantizer("reference", capture=choice)
        data = quantizer.to_config()
        assert data["capture"] == choice
        assert f"capture={choice!r}" in repr(quantizer)
        assert Quantizer.from_config(data).to_config() == data
    assert "capture" not in Quantizer("reference").to_config()
    with pytest.raises(InvalidConfig, match=r"'capture'.*expected \"whole\""):
        Quantizer.from_config({"capture": "pieces"})


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_ranges_of_parts_alone_are_ranges() -> None:
    """Nobody has called the model itself: its parts were calibrated all the same."""
    model, x = seeded(Parts).eval(), normal(4, 8)
    quantizer = Quantizer("reference", capture="modules")
    calib_model = quantizer.calib(model)
    calib_model.second(torch.relu(calib_model.first(x)))
    again = Quantizer("reference", capture="modules")
    again.load_state_dict(quantizer.state_dict())
    quant_model = quantizer.quantize(model, example_inputs=x)
    assert sqnr(model(x), quant_model(x)) > 25.0
