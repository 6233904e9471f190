"""Layers that take one tensor are called without matching the call."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torch_quant
from torch_quant import (
    Backend,
    CaptureFailed,
    PerGroup,
    QConfig,
    Quantizer,
    QuantSpec,
    recipes,
)
from torch_quant.convert import direct as module
from torch_quant.native.ops import WEIGHT_ONLY_LINEAR
from torch_quant.ops import library


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x)))
        return y


def quantized(**settings: Any) -> tuple[Any, Tensor]:
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    recipe = recipes.int4_weight_only(group_size=32)
    quantizer = Quantizer(recipe, backend="reference", **settings)
    return quantizer.quantize(Layers().eval(), example_inputs=x), x


def test_it_is_taken_and_gives_what_the_long_way_gives() -> None:
    model, x = quantized()
    (graph,) = model.a.quantization.graphs
    way = graph.direct(model.a.quantization.signature)
    assert way is not None
    assert way.takes(x)
    long = model.a(input=x)  # by name: the call is matched
    assert torch.equal(model.a(x), long)
    torch.testing.assert_close(model.a(x[:1, :3]), long[:1, :3])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.a(x), long)


def test_what_it_does_not_take_goes_the_long_way() -> None:
    model, x = quantized()
    (graph,) = model.a.quantization.graphs
    way = graph.direct(model.a.quantization.signature)
    for wrong in (x.double(), x[..., :16], x[0, 0, 0], nn.Parameter(x), "x"):
        assert not way.takes(wrong)
    with pytest.raises(CaptureFailed, match=r"input\.shape\[2\] is 16"):
        model.a(x[..., :16])
    with pytest.raises(CaptureFailed, match=r"input\.shape\[1\] is 16, .* captured for 32"):
        model.a(x[0, :, :16])
    with pytest.raises(CaptureFailed, match="input has 0 dimensions; it was captured for 3"):
        model.a(x[0, 0, 0])
    assert torch.equal(model.a(nn.Parameter(x)), model.a(x))


@pytest.mark.parametrize(
    "recipe",
    [
        recipes.int4_weight_only(group_size=32),
        recipes.int8_weight_only(),
        recipes.int8_dynamic(),
        recipes.int4_weight_only(group_size=32, symmetric=False, float_zero_points=True),
    ],
    ids=["int4", "int8", "dynamic", "float zeros"],
)
@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_layers_take_tensors_of_any_rank(backend: str, recipe: QConfig, tmp_path: Path) -> None:
    """No other graph is made, so a model that was loaded alone does too."""
    if reason := Backend.get(backend).unavailable():
        pytest.skip(reason)
    model = nn.Sequential(nn.Embedding(16, 64), nn.Linear(64, 32)).eval()
    skeleton = copy.deepcopy(model)
    example = torch.arange(6).reshape(2, 3)
    quantizer = Quantizer(recipe, backend=backend, capture="modules")
    made = quantizer.quantize(model, example_inputs=example)
    torch_quant.save(made, tmp_path / "model")
    del model, quantizer
    for quant_model in (made, torch_quant.load(tmp_path / "model", skeleton)):
        table, layer = quant_model[0], quant_model[1]
        rows = table(example)
        expected = layer(rows)
        for shape in ((6,), (1, 2, 3), (3, 1, 1, 2)):
            assert torch.equal(table(example.reshape(shape)), rows.reshape(*shape, 64))
            torch.testing.assert_close(  # REFERENCE multiplies by another kernel, whose sums round
                layer(rows.reshape(*shape, 64)), expected.reshape(*shape, 32)
            )
            assert torch.equal(
                layer(input=rows.reshape(*shape, 64)), layer(rows.reshape(*shape, 64))
            )
        torch.testing.assert_close(layer(rows[0, 0]), expected[0, 0])
        assert torch.equal(table(example[0, 0]), rows[0, 0])
        assert len(table.graphs) == len(layer.graphs) == 1
        with pytest.raises(CaptureFailed, match=r"input\.shape\[0\] is 16, .* captured for 64"):
            layer(rows[0, 0, :16])


@pytest.mark.parametrize("bits", [8, 7])
@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_static_layers_take_tensors_of_any_rank(backend: str, bits: int, tmp_path: Path) -> None:
    """Saved and loaded, when no other graph can be made."""
    if reason := Backend.get(backend).unavailable():
        pytest.skip(reason)
    torch.manual_seed(0)
    model, x = nn.Linear(64, 32).eval(), torch.randn(6, 64)
    quantizer = Quantizer(QConfig(input=QuantSpec.of(bits=bits)), backend=backend)
    quantizer.calib(model)(x)
    torch_quant.save(quantizer.quantize(model), tmp_path / "model")
    loaded = torch_quant.load(tmp_path / "model", nn.Linear(64, 32))
    expected = loaded(x)
    for shape in ((2, 3), (1, 1, 6), (3, 1, 2, 1)):
        for given in (loaded(x.reshape(*shape, 64)), loaded(input=x.reshape(*shape, 64))):
            # Integers are the same; REFERENCE multiplies by another kernel, whose sums round.
            torch.testing.assert_close(given, expected.reshape(*shape, 32))
    torch.testing.assert_close(loaded(x[0]), expected[0])
    for shape in ((0,), (2, 0), (0, 3, 1)):
        assert loaded(torch.empty(*shape, 64)).shape == (*shape, 32)
    assert len(loaded.graphs) == 1
    with pytest.raises(CaptureFailed, match=r"input\.shape\[2\] is 16, .* captured for 64"):
        loaded(torch.empty(2, 3, 16))


_PER_GROUP = QConfig(
    input=QuantSpec.of("int8", granularity=PerGroup(32), dynamic=True),
    weight=QuantSpec.of("int8", per_channel=True),
)


@pytest.mark.parametrize(
    ("backend", "recipe"),
    [
        ("reference", recipes.int8_dynamic()), ("onednn", recipes.int8_dynamic()),
        ("reference", recipes.int8_static()), ("onednn", recipes.int8_static()),
        ("reference", recipes.int8_weight_only(group_size=32)),
        ("onednn", recipes.int8_weight_only(group_size=32)), ("reference", _PER_GROUP),
    ],
    ids=[
        "reference-per token", "onednn-per token", "reference-static", "onednn-static",
        "reference-weights", "onednn-weights", "reference-per group",
    ],
)  # fmt: skip
def test_layers_take_tensors_without_rows(backend: str, recipe: QConfig) -> None:
    """An expert that gets no token is called all the same."""
    if reason := Backend.get(backend).unavailable():
        pytest.skip(reason)
    model, x = nn.Sequential(nn.Linear(64, 32)).eval(), torch.rand(4, 64)
    quantizer = Quantizer(recipe, backend=backend)
    quantizer.calib(model)(x)
    quant_model = quantizer.quantize(model)
    expected = quant_model(x)
    for shape in ((0, 64), (2, 0, 64)):
        found = quant_model(torch.rand(shape))
        assert found.shape == (*shape[:-1], 32)
        assert found.dtype is torch.float32
    assert torch.equal(quant_model(x), expected)


def test_a_graph_is_asked_once_whether_its_rank_counts(monkeypatch: Any) -> None:
    """Looking through it takes as long as calling it."""
    model, x = quantized()
    asked, look = [], module.computes_rows
    monkeypatch.setattr(module, "computes_rows", lambda body: asked.append(body) or look(body))
    expected = model.a(input=x)
    for _ in range(3):
        assert torch.equal(model.a(input=x[0]), expected[0])
        assert torch.equal(model.a(x[0]), expected[0])
    assert len(asked) == 1
    twin = copy.deepcopy(model)
    assert torch.equal(twin.a(input=x[0]), expected[0])


def test_other_modules_keep_the_rank_that_they_were_captured_for() -> None:
    """Their own Python may go by it, though the graph is that of a layer."""

    class Squeezing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.dim() == 3 else -x)

    model, x = Squeezing(32, 8).eval(), torch.ones(1, 2, 32)
    recipe = recipes.int8_weight_only()
    quantizer = Quantizer(recipe, backend="reference", unseen_calls="error")
    quant_model = quantizer.quantize(model, example_inputs=x)
    with pytest.raises(CaptureFailed, match=r"(input|x) has 2 dimensions"):
        quant_model(x[0])


def test_hooks_moves_and_tracing() -> None:
    model, x = quantized()
    expected, seen = model(x), []
    handle = model.a.register_forward_hook(lambda *each: seen.append(each[2]))
    assert torch.equal(model(x), expected)
    assert len(seen) == 1
    handle.remove()
    twice = copy.deepcopy(model)
    for name in ("weight", "bias"):
        assert getattr(twice.a, name) is not getattr(model.a, name)
    with torch.no_grad():
        twice.a.bias.add_(1.0)  # what is moved or changed is what runs
        twice.a._buffers["weight_scale"] = twice.a.weight_scale * 2
    assert torch.equal(twice.a(x), twice.a(input=x))
    assert not torch.equal(twice.a(x), model.a(x))
    traced = torch.jit.trace(model.a, (x,))
    assert torch.equal(traced(x[:1]), model.a(x[:1]))
    exported = torch.export.export(model.a, (x,)).module()
    assert torch.equal(exported(x), model.a(x))
    with torch.no_grad():
        assert torch.equal(torch.compile(model.a, backend="eager")(x), model.a(x))


def test_sizes_that_depend_on_each_other_have_no_short_way() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x @ x.transpose(0, 1) @ x) if x.shape[0] > 3 else self.fc(x)
            return y

    x = torch.randn(5, 8)
    quantizer = Quantizer("reference", unseen_calls="error")
    model = Square().eval()
    quantizer.calib(model)(x)
    quant_model = quantizer.quantize(model)
    assert quant_model.graphs[0].direct(quant_model.signature) is None
    with pytest.raises(CaptureFailed):
        quant_model(x[:2])
    assert module.__all__ == ["Direct", "direct", "fixed_width"]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x), x


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.fc(x)}


@pytest.mark.parametrize("kind", [Pair, Wrapped])
def test_results_that_nest_go_the_long_way(kind: Any) -> None:
    model, x = kind().eval(), torch.randn(4, 32)
    recipe = recipes.int8_weight_only()
    quantizer = Quantizer(recipe, backend="reference", capture="whole")
    quant_model = quantizer.quantize(model, example_inputs=x)
    found = quant_model(x)
    assert quant_model.graphs[0].direct(quant_model.signature) is None
    assert type(found) is type(model(x))


class Names(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def on_kernels() -> tuple[Any, Tensor]:
    """A layer on this package's kernels, whose operators are functions."""
    if reason := Backend.ONEDNN.unavailable():
        pytest.skip(reason)
    quantizer = Quantizer(recipes.int4_weight_only(group_size=32), backend="onednn")
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    return quantizer.quantize(Layers().eval(), example_inputs=x), x


def test_operators_are_called_as_functions_unless_somebody_follows_them() -> None:
    model, x = on_kernels()
    before, calls = model(x), []
    real = library._PLAIN[WEIGHT_ONLY_LINEAR]
    assert module.plain_function(WEIGHT_ONLY_LINEAR) is real
    with Names() as names:
        assert torch.equal(model(x), before)
    assert names.found.count("torch_quant.weight_only_linear.default") == 2
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    calls = [each for each in profile.events() if each.name == "torch_quant::weight_only_linear"]
    assert len(calls) == 2
    traced = torch.jit.trace(model, x)
    assert torch.equal(traced(x), before)


def test_gradients_other_devices_and_vmap_are_the_operators_business() -> None:
    model, x = on_kernels()
    with torch.enable_grad():
        given = x.clone().requires_grad_()
        (way,) = (graph.direct(model.a.quantization.signature) for graph in model.a.graphs)
        by_operator = _by_operator(model.a, given)
        (made,) = way.function(given)
    assert made.requires_grad == by_operator.requires_grad
    assert torch.equal(made, by_operator)
    mapped = torch.vmap(model.a, in_dims=0)
    try:
        expected = torch.vmap(lambda row: _by_operator(model.a, row))(x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:40])):
            mapped(x)
    else:
        assert torch.equal(mapped(x), expected)
    weight = model.a.weight.to("meta")
    assert library.unwatched([x, model.a.weight])
    assert not library.unwatched([x, weight])  # a kernel would read an address


def _by_operator(layer: Any, x: Tensor) -> Tensor:
    made: Tensor = WEIGHT_ONLY_LINEAR(x, layer.weight, layer.weight_scale, None, layer.bias, 4, 8)
    return made


def test_functions_take_what_their_operators_take() -> None:
    assert len(library._PLAIN) > 8
    for operator, function in library._PLAIN.items():
        names = [each.name for each in operator._schema.arguments]
        assert len(inspect.signature(function).parameters) == len(names), operator
