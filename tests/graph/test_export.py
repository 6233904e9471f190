from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD
from capturing import Compute, Two, capture, executor, serve
from models import MODELS, example, images, normal, seeded
from thinning import third
from torch import Tensor, nn

from torch_quant.errors import CaptureFailed
from torch_quant.graph.calls import flatten_call
from torch_quant.graph.export import ModelRefuses, export_graph
from torch_quant.graph.running import no_fastpath
from torch_quant.graph.twin import twin_of

pytestmark = pytest.mark.sparse


@pytest.mark.parametrize("name", MODELS)
def test_an_example_of_batch_1_serves_batch_3(name: str) -> None:
    """Bit for bit: the graph runs the operators that the module runs."""
    model = MODELS[name]()
    graph = capture(model, *example(name, 1))
    assert graph.exact
    for batch in (1, 3):
        inputs = example(name, batch)
        assert torch.equal(serve(graph, *inputs), model(*inputs))


EXPORTED = [e.name for e in AWKWARD.values() if e.exports and e.name != "batch_second"]


@pytest.mark.sparse
@pytest.mark.parametrize("name", [*MODELS, *third(EXPORTED, 2)])
def test_an_example_of_batch_4_serves_batch_1(name: str) -> None:
    """Calibrated on batches, deployed on single inputs: without being captured again."""
    if name in MODELS:
        model, inputs = MODELS[name](), lambda batch: (example(name, batch), {})
    else:
        model, inputs = AWKWARD[name].build(), AWKWARD[name].inputs
    args, kwargs = inputs(4)
    graph = capture(model, *args, **kwargs)
    for batch in (1, 6):
        call = flatten_call(*inputs(batch))
        assert graph.contract.mismatch(call) is None


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_holds_the_models_own_tensors(name: str) -> None:
    model = MODELS[name]()
    graph = capture(model, *example(name))
    own = {id(x) for x in (*model.parameters(), *model.buffers())}
    parameters = list(graph.gm.parameters())
    assert parameters
    assert {id(x) for x in parameters} <= own
    for node in graph.gm.graph.nodes:
        if node.op == "get_attr" and node.target in dict(model.named_parameters()):
            assert graph.gm.get_parameter(node.target) is model.get_parameter(node.target)


def test_other_lengths_and_image_sizes() -> None:
    model = MODELS["small_cnn"]()
    graph = capture(model, images(2, 16))
    assert torch.equal(serve(graph, images(3, 24)), model(images(3, 24)))
    model = MODELS["attention_explicit"]()
    graph = capture(model, normal(2, 12, 16))
    assert torch.equal(serve(graph, normal(1, 5, 16)), model(normal(1, 5, 16)))


def test_sizes_from_parameters_are_fixed() -> None:
    graph = capture(Two(), normal(2, 7, 16))
    (shape,) = graph.contract.shapes
    assert isinstance(shape[0], str)
    assert isinstance(shape[1], str)
    assert shape[2] == 16
    with pytest.raises(CaptureFailed, match=r"args\[0\]\.shape\[2\] is 8"):
        serve(graph, normal(2, 7, 8))


def test_inputs_that_must_share_a_size() -> None:
    graph = capture(Compute(lambda x, y: x + y.sigmoid()), normal(4, 6), normal(4, 6, salt=1))
    with pytest.raises(CaptureFailed, match="both must be equal"):
        serve(graph, normal(4, 6), normal(5, 6))


def test_a_size_that_follows_from_another() -> None:
    model = Compute(lambda x, y: torch.cat([x, x], 1) + y)
    graph = capture(model, normal(4, 3), normal(4, 6))
    assert torch.equal(
        serve(graph, normal(2, 5), normal(2, 10)), model(normal(2, 5), normal(2, 10))
    )
    with pytest.raises(CaptureFailed, match=r"args\[[01]\]\.shape\[1\]"):
        serve(graph, normal(2, 5), normal(2, 11))


def test_a_batch_size_the_module_insists_on() -> None:
    graph = capture(Compute(lambda x: x.view(2, -1).cumsum(0)), normal(2, 6))
    assert torch.equal(serve(graph, normal(2, 6)), normal(2, 6).cumsum(0))


SIZE_DEPENDENT: dict[str, Callable[[Tensor], Tensor]] = {
    "branch": lambda x: x * 2 if x.shape[1] > 4 else x - 1,
    "parity": lambda x: x * 2 if x.shape[1] % 2 else x - 1,
    "equality": lambda x: x * 2 if x.shape[1] == x.shape[0] + 4 else x - 1,
    "loop": lambda x: sum((x[:, i : i + 1] for i in range(x.shape[1])), x * 0),
    "a float of a size": lambda x: F.scaled_dot_product_attention(x, x, x, scale=1 / x.shape[1]),
    "a diagonal by a size": lambda x: torch.ones(x.shape[1], x.shape[1]).tril(x.shape[1] - 4) @ x,
    "a root of a size": lambda x: x / math.sqrt(x.shape[1]),
    "product of sizes": lambda x: x / x.numel(),
}


@pytest.mark.sparse
@pytest.mark.parametrize("name", SIZE_DEPENDENT)
@pytest.mark.parametrize("length", [3, 4, 7, 8])
def test_no_call_gets_the_answer_for_another_size(name: str, length: int) -> None:
    """What was decided by the example's sizes belongs to the contract."""
    model = Compute(SIZE_DEPENDENT[name])
    run, _ = executor(model)
    run(normal(2, 6, 8))
    x = normal(2, length, 8)
    torch.testing.assert_close(run(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("example_batch", [1, 2, 4])
def test_no_call_gets_the_answer_for_another_batch_size(example_batch: int, limit: int) -> None:
    """Nor one of the sizes that were tried at capture, and found to take another path."""
    model = Compute(lambda x: x * 2 if x.shape[0] < limit else x - 1)
    run, _ = executor(model)
    run(normal(example_batch, 6))
    for batch in (1, 2, 3, 4, 8):
        assert torch.equal(run(normal(batch, 6)), model(normal(batch, 6)))


class Raises(Two):
    def forward(self, x: Tensor, limit: int = 4) -> Tensor:
        if x.shape[1] > limit:
            raise KeyError("the model's own words")
        return self.l0(x)


def test_a_call_that_the_model_refuses() -> None:
    with pytest.raises(ModelRefuses) as caught:
        capture(Raises(), x=normal(2, 16))
    message = str(caught.value)
    assert "KeyError" in message
    assert "the model's own words" in message
    assert "x: (2, 16) float32" in message
    assert isinstance(caught.value.__cause__, KeyError)


EXPORTED_HERE = {
    "dataclass_output": "plain objects among the outputs are no obstacle",
    "user_hooks": "hooks are traced with the rest; a module that has some is what refuses",
}
"""Entries that torch.export or a module does not take whole, but export_graph does."""


@pytest.mark.parametrize(
    "name", [e.name for e in AWKWARD.values() if not e.exports and e.name not in EXPORTED_HERE]
)
def test_what_does_not_export(name: str) -> None:
    entry = AWKWARD[name]
    args, kwargs = entry.inputs(2)
    with pytest.raises(CaptureFailed) as caught:
        capture(entry.build(), *args, **kwargs)
    assert not isinstance(caught.value, ModelRefuses)
    assert str(caught.value)


def test_a_call_without_tensors() -> None:
    with pytest.raises(CaptureFailed, match="no tensor input"):
        capture(Compute(lambda n: torch.ones(n)), 3)


def branches_on_data(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


def leaves_torch(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() + 1)


def depends_on_a_count(x: Tensor) -> Tensor:
    picked = x[x > 0]
    return picked.view(2, picked.numel() // 2) if picked.numel() % 2 == 0 else picked


@pytest.mark.parametrize("function", [branches_on_data, leaves_torch, depends_on_a_count])
def test_a_failing_export_says_nothing(
    function: Callable[[Tensor], Tensor],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Only our own logger may speak; as warnings are errors here, they would be seen as well."""
    stderr = sys.stderr
    with caplog.at_level(logging.WARNING), pytest.raises(CaptureFailed):
        capture(Compute(function), normal(2, 3))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert sys.stderr is stderr
    assert not logging.getLogger("torch.fx.experimental.symbolic_shapes").disabled


class Counts(Two):
    """Writes to its buffers, in place or by making new ones."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("mean", torch.full((16,), torch.nan))

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.steps += 1
            self.mean.copy_(x.mean(0))
        else:
            self.steps, self.mean = self.steps + 1, x.mean(0)
        return self.l0(x) + self.mean * self.steps


@pytest.mark.parametrize("in_place", [True, False], ids=["written", "assigned"])
def test_buffers_are_as_before(in_place: bool) -> None:
    model = Counts(in_place)
    twin = twin_of(model)
    with contextlib.suppress(CaptureFailed):
        export_graph(twin, flatten_call((normal(2, 16),), {}))
    for module in (model, twin):
        assert module.steps.tolist() == [0.0]
        assert module.mean.isnan().all()
    assert twin.steps is model.steps
    assert twin.mean is model.mean


def test_a_graph_that_writes_to_buffers_does_what_the_module_does() -> None:
    model, same = Counts(in_place=True), Counts(in_place=True)
    same.load_state_dict(model.state_dict())
    graph = capture(model, normal(2, 16))
    for batch in (2, 3):
        assert torch.equal(serve(graph, normal(batch, 16)), same(normal(batch, 16)))
    assert torch.equal(model.steps, same.steps)


def test_surroundings_are_left_alone() -> None:
    model = AWKWARD["in_place_on_input"].build()
    x = images(2)
    before, version = x.clone(), x._version
    random, fastpath = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    with torch.enable_grad():
        capture(model.requires_grad_(True), x)
        assert torch.is_grad_enabled()
    assert torch.equal(x, before)
    assert x._version == version
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_train_mode_is_captured_as_eval() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)).train()
    graph = capture(model, normal(4, 16))
    expected = twin_of(model)(normal(4, 16))
    assert torch.equal(serve(graph, normal(4, 16)), expected)
    assert torch.equal(model[1].running_mean, torch.zeros(16))


def test_attention_modules_compute_by_their_own_layers() -> None:
    with no_fastpath():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    graph = capture(AWKWARD["encoder_layers"].build(), normal(2, 7, 16))
    targets = [node.target for node in graph.gm.graph.nodes]
    assert targets.count(torch.ops.aten.linear.default) == 8
    assert not any("_transformer_encoder_layer" in str(target) for target in targets)


@pytest.mark.parametrize("name", ["nested_output", "none_output"])
def test_outputs_keep_their_form(name: str) -> None:
    entry = AWKWARD[name]
    model = entry.build()
    graph = capture(model, *entry.inputs(1)[0])
    (x,), _ = entry.inputs(3)
    expected, actual = model(x), serve(graph, x)
    assert type(actual) is type(expected)
    if name == "nested_output":
        assert type(actual["pair"]) is type(expected["pair"])
        assert actual["hidden"][1][1] == 16
        assert torch.equal(actual["pair"].scale, expected["pair"].scale)
    else:
        assert actual[1] is None
        assert actual[2] is x
        assert torch.equal(actual[0], expected[0])


@pytest.mark.parametrize(
    "inputs",
    [(None, 3), ("gelu", 1), (True, 2)],
    ids=str,
)
def test_constants_are_part_of_the_graph(inputs: tuple[Any, ...]) -> None:
    def compute(x: Tensor, kind: Any, times: int) -> Tensor:
        for _ in range(times):
            x = F.gelu(x) if kind == "gelu" else x * 2 if kind else x - 1
        return x

    graph = capture(Compute(compute), normal(2, 16), *inputs)
    assert len(list(graph.gm.graph.find_nodes(op="placeholder"))) == 1
    assert torch.equal(serve(graph, normal(3, 16), *inputs), compute(normal(3, 16), *inputs))


def test_outputs_of_any_dtype() -> None:
    def compute(x: Tensor) -> tuple[Tensor, ...]:
        return torch.fft.rfft(x), x > 0, x.argmax(-1), x.double(), x[:, :0]

    graph = capture(Compute(compute), normal(2, 16))
    for actual, expected in zip(serve(graph, normal(3, 16)), compute(normal(3, 16)), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


class Named(nn.Module):
    """Arguments by names that mean something in generated code."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, slice: Tensor, device: Tensor, input_1: Tensor, linear: Tensor) -> Tensor:
        y = self.linear(slice[:, 1:9]) + device.to(torch.device("cpu"))
        return y * input_1 + linear


def test_arguments_of_any_name() -> None:
    model, others = seeded(Named), [normal(3, 8, salt=i) for i in range(3)]
    inputs = dict(
        zip(("slice", "device", "input_1", "linear"), [normal(3, 10), *others], strict=True)
    )
    graph = export_graph(twin_of(model), flatten_call((), inputs))
    names = [node.target for node in graph.gm.graph.find_nodes(op="placeholder")]
    assert names == ["input_0", "input_1", "input_2", "linear"]
    assert torch.equal(graph.gm(*inputs.values())[0], model(**inputs))


def test_an_argument_called_as_the_exporter_calls_another() -> None:
    class Second(nn.Module):
        def forward(self, x: Tensor, tensors_0: Tensor) -> Tensor:
            return x - 2 * tensors_0

    inputs = {"x": normal(3, 8), "tensors_0": normal(3, 8, salt=1)}
    graph = export_graph(twin_of(Second()), flatten_call((), inputs))
    assert torch.equal(graph.gm(*inputs.values())[0], Second()(**inputs))
