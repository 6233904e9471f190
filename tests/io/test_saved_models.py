"""``torch_quant.save`` and ``load``: the same outputs bit for bit, and nothing that runs."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import AWKWARD
from flows import BACKENDS, Inputs, calibrated, run
from models import MODELS, example, normal, seeded
from thinning import rarely, third
from torch import Tensor, nn

import torch_quant
from torch_quant import InvalidConfig, QConfig, Quantizer, QuantSpec, SmoothQuant, load, save
from torch_quant.graph.outputs import flatten_output


def skeleton(model: nn.Module) -> nn.Module:
    """The class without the weights."""
    return copy.deepcopy(model).to("meta")


def equal(x: Any, y: Any) -> bool:
    """Whether two outputs are the same, however they nest."""
    (ours, first), (theirs, second) = flatten_output(x), flatten_output(y)
    return str(first) == str(second) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(ours, theirs, strict=True)
    )


def saved(model: nn.Module, inputs: list[Inputs], folder: Path, **options: Any) -> nn.Module:
    """Quantized, saved."""
    quant_model = calibrated(model, inputs, **options).quantize(model)
    save(quant_model, folder)
    return quant_model


@pytest.mark.thin
@pytest.mark.parametrize("backend", [*BACKENDS, "onnx"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_outputs_names_and_class(name: str, backend: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    quant_model = saved(model, [(example(name, 16), {})], tmp_path, backend=backend)
    inputs: Inputs = example(name, 3), {}
    expected = run(quant_model, inputs)
    alone, whole = load(tmp_path), load(tmp_path, skeleton(model))
    for again in (alone, whole):
        assert equal(run(again, inputs), expected)
        assert list(again.state_dict()) == list(quant_model.state_dict())
        assert str(again.plan) == str(quant_model.plan)
        assert again.training is False
    assert isinstance(whole, type(model))
    assert not any(x.device.type == "meta" for x in whole.state_dict().values())
    assert "%" in repr(whole)


@pytest.mark.parametrize("name", third(AWKWARD, 2))
def test_awkward_models(name: str, tmp_path: Path) -> None:
    entry = AWKWARD[name]
    model, inputs = entry.build(), entry.inputs(3)
    quantizer = calibrated(model, [inputs], backend="reference")
    try:
        quant_model = quantizer.quantize(model)
    except torch_quant.UnsupportedOp:
        return  # there is nothing to save
    save(quant_model, tmp_path / "model")
    again = load(tmp_path / "model", entry.build())
    torch.manual_seed(0)
    expected = run(quant_model, entry.inputs(3))
    torch.manual_seed(0)
    assert equal(run(again, entry.inputs(3)), expected)


class Branches(nn.Module):
    """Python code that no graph can hold: it asks for values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        self.extra = nn.Linear(8, 4)
        self.shared = self.second
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if float(x.sum()) > 0:
            x = x * self.scale
        return self.second(x) + self.shared(x)

    def named(self) -> str:
        return f"branches of {self.scale}"


def test_python_code_comes_from_the_class_and_weights_from_the_file(tmp_path: Path) -> None:
    model, x = seeded(Branches), normal(16, 8)
    quant_model = saved(model, [((x,), {}), ((-x,), {})], tmp_path, backend="onednn")
    with pytest.raises(InvalidConfig, match=r"runs Python code of test_saved_models\.Branches"):
        load(tmp_path)
    again = load(tmp_path, skeleton(model))
    for each in (x, -x, x[:3]):
        assert torch.equal(again(each), quant_model(each))
    assert again.named() == "branches of 2.0"
    assert again.shared is again.second
    assert again.state_dict().keys() == quant_model.state_dict().keys()


class Remembers(nn.Module):
    """Keeps a tensor between its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(8, 4)
        self.h = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.h = torch.tanh(self.cell(torch.cat([x, self.h])))
        return self.h


def test_the_state_that_a_model_keeps_is_saved(tmp_path: Path) -> None:
    model, steps = seeded(Remembers), normal(6, 4)
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    for x in steps:
        calib_model(x)
    quant_model = quantizer.quantize(model)
    quant_model(steps[0])
    save(quant_model, tmp_path)
    again = load(tmp_path, seeded(Remembers))
    for x in steps[1:]:
        assert torch.equal(again(x), quant_model(x))


@pytest.mark.parametrize(
    "options",
    [
        {"qconfig": QConfig(weight=QuantSpec.of("int4", per_channel=True))},
        {"qconfig": QConfig(QuantSpec.of("float8_e4m3fn"), QuantSpec.of("float8_e4m3fn"))},
        {"qconfig": QConfig(transforms=[SmoothQuant(0.5)])},
        {"overrides": {"0": None}},
    ],
    ids=["int4", "float8", "smooth", "one in float"],
)
def test_other_formats_and_what_stays_in_float(options: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = MODELS["mlp"](), (example("mlp", 16), {})
    quant_model = saved(model, [inputs], tmp_path, backend="reference", **options)
    assert equal(run(load(tmp_path), inputs), run(quant_model, inputs))
    assert load(tmp_path).plan["2"] == quant_model.plan["2"]


def test_a_fallen_back_model_has_its_own_float_weights(tmp_path: Path) -> None:
    model, inputs = MODELS["mlp"](), (example("mlp", 16), {})
    quantizer = calibrated(model, [inputs], backend="onednn")
    quantizer.fallback(_amp(quantizer, model, inputs), num=1)
    quant_model = quantizer.quantize(model)
    save(quant_model, tmp_path)
    for x in model.parameters():
        x.data.zero_()
    again = load(tmp_path, model)
    assert equal(run(again, inputs), run(quant_model, inputs))


def _amp(quantizer: Quantizer, model: nn.Module, inputs: Inputs) -> Any:
    amp_model = quantizer.amp(model)
    run(amp_model, inputs)
    return amp_model


def test_saving_again_what_was_loaded_copied_or_pickled(tmp_path: Path) -> None:
    model, inputs = MODELS["tiny_transformer"](), (example("tiny_transformer", 8), {})
    quant_model = saved(model, [inputs], tmp_path / "0", backend="onednn")
    expected = run(quant_model, inputs)
    again = load(tmp_path / "0", skeleton(model))
    for i, each in enumerate((again, copy.deepcopy(again)), start=1):
        save(each, tmp_path / str(i))
        assert equal(run(load(tmp_path / str(i)), inputs), expected)
    first, second = (json.loads((tmp_path / str(i) / "model.json").read_text()) for i in (0, 1))
    assert first == second


def test_calls_by_keyword_defaults_and_other_inputs(tmp_path: Path) -> None:
    class Options(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor, mask: Tensor | None = None, *, twice: bool = False) -> Any:
            y = self.layer(x if mask is None else x * mask)
            return {"y": y, "more": (y + y if twice else y,)}

    model, x = seeded(Options), normal(6, 8)
    calls: list[Inputs] = [((x,), {}), ((x,), {"mask": x > 0}), ((x,), {"twice": True})]
    quant_model = saved(model, calls, tmp_path, backend="reference")
    again = load(tmp_path)
    for args, kwargs in calls:
        assert equal(run(again, (args, kwargs)), run(quant_model, (args, kwargs)))
    assert equal(again(x=x, twice=False), quant_model(x))
    assert list(inspect.signature(again.forward).parameters) == ["x", "mask", "twice"]
    with pytest.raises(torch_quant.CaptureFailed, match="was quantized for other inputs"):
        again(x.double())


def test_a_cache_among_the_outputs_needs_its_class_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = seeded(lambda: LlamaForCausalLM(config))
    ids = torch.randint(0, 64, (2, 7))
    quant_model = saved(model, [((ids,), {})], tmp_path, backend="onednn")
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    again = load(tmp_path, empty)
    assert isinstance(again, LlamaForCausalLM)
    assert again.config is empty.config
    ours, theirs = again(ids), quant_model(ids)
    assert type(ours) is type(theirs)
    assert torch.equal(ours.logits, theirs.logits)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)  # as in a process that has not imported it
    with pytest.raises(InvalidConfig, match="import the module that has it") as told:
        load(tmp_path)
    assert "is of the class transformers." in str(told.value)


READ = """
import sys, torch
sys.path.insert(0, {tests!r})
import torch_quant
model = torch_quant.load({folder!r})
inputs = torch.load({folder!r} + "/inputs.pt")
torch.save(model(*inputs), {folder!r} + "/outputs.pt")
"""


@pytest.mark.long("three seconds; a script and another torch read files in other tests")
def test_another_process_reads_it(tmp_path: Path) -> None:
    model, x = MODELS["small_cnn"](), example("small_cnn", 4)
    quant_model = saved(model, [(x, {})], tmp_path, backend="onednn")
    torch.save(x, tmp_path / "inputs.pt")
    code = READ.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(torch.load(tmp_path / "outputs.pt"), quant_model(*x))


OTHER = Path(__file__).parents[2] / (
    ".venv/bin/python" if torch.__version__.startswith("2.8") else ".venv-ipex/bin/python"
)


@pytest.mark.skipif(
    not OTHER.exists(), reason=f"there is no {OTHER}: make test builds both environments"
)
@pytest.mark.parametrize("name", [rarely("small_cnn"), "tiny_transformer"])
def test_another_torch_reads_it(name: str, tmp_path: Path) -> None:
    """Written here, computed there and here: the same numbers on REFERENCE.

    Products are summed in another order there, so that single values fall on another step.
    """
    model, x = MODELS[name](), example(name, 4)
    quant_model = saved(model, [(x, {})], tmp_path, backend="reference")
    torch.save(x, tmp_path / "inputs.pt")
    code = READ.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    subprocess.run([str(OTHER), "-c", code], check=True, cwd=Path(__file__).parents[2])
    theirs = torch.load(tmp_path / "outputs.pt")
    assert torch_quant.sqnr(quant_model(*x), theirs) > 35.0


@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_what_is_in_float_gives_the_same_bits(backend: str, tmp_path: Path) -> None:
    """Weights of a file lie anywhere; sums of floats depend on where."""
    sizes = [(8, 4), (4, 7), (7, 3), (3, 9)]
    model = seeded(lambda: nn.Sequential(*(nn.Linear(*each) for each in sizes)))
    model.requires_grad_(False)
    quantizer = calibrated(model, [((normal(6, 8),), {})], backend=backend)
    amp_model = quantizer.amp(model)
    amp_model(normal(6, 8))
    quantizer.fallback(amp_model, num=len(sizes))
    quant_model = quantizer.quantize(model)
    save(quant_model, tmp_path)
    again = load(tmp_path, model)
    for x in again.parameters():
        assert x.data_ptr() % 64 == 0
    for rows in (1, 2, 5):
        x = normal(rows, 8)
        assert torch.equal(again(x), quant_model(x))
        assert torch.equal(again(x), model(x))


def test_the_size_of_int8(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))).requires_grad_(False)
    saved(model, [((normal(8, 256),), {})], tmp_path, backend="onednn")
    size = sum(each.stat().st_size for each in tmp_path.iterdir())
    whole = sum(x.nbytes for x in model.parameters())
    assert size < 0.27 * whole + 20_000  # a quarter, scales, and the JSON


class Counts(nn.Module):
    """Keeps a number between its calls, and a list that its own code writes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


def test_plain_values_that_a_model_keeps_are_saved(tmp_path: Path) -> None:
    model, x = seeded(Counts), normal(6, 8)
    quant_model = calibrated(model, [((x,), {})], backend="reference").quantize(model)
    for _ in range(3):
        quant_model(x)
    save(quant_model, tmp_path)
    again = load(tmp_path, seeded(Counts))
    for _ in range(2):
        assert torch.equal(again(x), quant_model(x))


def test_hooks_are_code_of_the_models(tmp_path: Path) -> None:
    def times_100(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * 100

    def hooked() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).requires_grad_(False)
        model[0].register_forward_hook(times_100)
        return model

    model, x = seeded(hooked), normal(6, 8)
    quant_model = saved(model, [((x,), {})], tmp_path, backend="reference")
    assert torch.equal(load(tmp_path, hooked())(x), quant_model(x))
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    for other in (None, plain):
        with pytest.raises(InvalidConfig, match=r"forward hooks|runs Python code"):
            load(tmp_path, other)


IN_MAIN = """
import collections, sys, torch
import torch_quant
Out = collections.namedtuple("Out", ["y", "z"])
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
    def forward(self, x):
        y = self.layer(x)
        return Out(y, y + 1)
model, x = Net(), torch.randn(8, 4)
quantizer = torch_quant.Quantizer("reference")
quantizer.calib(model)(x)
quant_model = quantizer.quantize(model)
torch_quant.save(quant_model, sys.argv[1])
again = torch_quant.load(sys.argv[1], model)
assert type(again(x)) is Out and torch.equal(again(x).z, quant_model(x).z)
"""


def test_classes_of_a_script(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", IN_MAIN, str(tmp_path / "m")], check=True)


def test_float_tensors_of_the_skeleton_are_not_kept(tmp_path: Path) -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)
            self.table, self.stuff = torch.ones(1000, 4), [torch.ones(4)]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.table[0] + self.stuff[0]

    model, x = seeded(Tables), normal(6, 8)
    quant_model = saved(model, [((x,), {})], tmp_path / "a", backend="reference")
    again = load(tmp_path / "a", seeded(Tables))
    assert not hasattr(again, "stuff")
    save(again, tmp_path / "b")
    assert torch.equal(load(tmp_path / "b")(x), quant_model(x))


def test_nothing_is_logged_or_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        saved(MODELS["mlp"](), [(example("mlp", 8), {})], tmp_path, backend="reference")
        load(tmp_path)
    assert not caplog.records
