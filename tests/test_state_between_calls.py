"""Modules that keep something between calls, or change what they are given: proxies do so too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flows import BACKENDS, assert_unchanged, snapshot
from models import normal, seeded, tokens
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo_text import SMALL

from torch_quant import Quantizer, sqnr
from torch_quant.errors import NotCalibrated


class Smoother(nn.Module):
    """Streams: each result depends on the last one, which is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.reset()

    def reset(self) -> None:
        self.h: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.h = y if self.h is None else 0.5 * (y + self.h)
        return self.h


class History(nn.Module):
    """Keeps a list, and averages over it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.reset()

    def reset(self) -> None:
        self.past: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.past.append(self.linear(x))
        return torch.stack(self.past[-3:]).mean(0)


class BufferState(nn.Module):
    """Keeps its state in a buffer that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("h", torch.zeros(3, 16))

    def forward(self, x: Tensor) -> Tensor:
        self.h = 0.5 * (self.linear(x) + self.h)
        return self.h


class ArrayState(nn.Module):
    """Counts its calls in a NumPy array."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.reset()

    def reset(self) -> None:
        self.count = np.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.count[0] += 1
        return self.linear(x) / float(self.count[0])


def nested(inner: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(16, 16), inner(), nn.ReLU(), nn.Linear(16, 4))


STATEFUL = {
    "attribute": Smoother,
    "list": History,
    "buffer": BufferState,
    "array": ArrayState,
    "attribute below": nested(Smoother),
    "list below": nested(History),
    "buffer below": nested(BufferState),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STATEFUL)
def test_a_sequence_of_calls(name: str, backend: str) -> None:
    model, same, other = (seeded(STATEFUL[name]).eval() for _ in range(3))
    calls = [normal(3, 16, salt=i) for i in range(5)]
    quantizer = Quantizer(backend)
    calib_model = quantizer.calib(model)
    for x in calls:
        assert torch.equal(calib_model(x), same(x))
    fresh = seeded(STATEFUL[name]).eval()
    later = Quantizer(backend)
    later.load_state_dict(quantizer.state_dict())
    quant_model = later.quantize(fresh, example_inputs=calls[0])
    assert len(later.plan.quantized) == sum(isinstance(m, nn.Linear) for m in model.modules())
    if "buffer" in name:  # what is captured whole ran on the model's own buffer
        quant_model = later.quantize(seeded(STATEFUL[name]).eval(), example_inputs=calls[0])
    expected = [other(x) for x in calls]
    actual = [quant_model(x) for x in calls]
    assert all(sqnr(y, z) > 20 for y, z in zip(expected, actual, strict=True))


def test_proxies_keep_a_state_of_their_own() -> None:
    model = seeded(Smoother).eval()
    before = snapshot(model)
    quantizer = Quantizer("reference")
    first, second = quantizer.calib(model), quantizer.calib(model)
    x = normal(3, 16)
    outputs = [first(x), first(x + 1), first(x - 1)]
    assert model.h is None
    assert_unchanged(model, before)
    assert torch.equal(second(x), outputs[0])  # it begins where the model is
    assert torch.equal(model(x), outputs[0])
    assert torch.equal(first.h, outputs[-1])  # its state can be looked at
    first.reset()
    assert torch.equal(first(x), outputs[0])
    model.reset()
    quant_model = quantizer.quantize(model)
    results = [quant_model(x), quant_model(x + 1)]
    quant_model.reset()
    assert torch.equal(quant_model(x), results[0])
    again = copy.deepcopy(quant_model)
    assert torch.equal(again(x + 1), results[1])


class FillsDict(nn.Module):
    """Concatenates what the caller's dictionary holds, and puts the result back."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        k = self.key(x)
        if "k" in cache:
            k = torch.cat([cache["k"], k], 1)
        cache["k"] = k
        return self.out(x + k.mean(1, keepdim=True))


class AppendsList(nn.Module):
    """Appends every layer's result to the caller's list, which it also returns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def forward(self, x: Tensor, hidden: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        for layer in self.layers:
            x = layer(x).relu()
            hidden.append(x)
        return x, hidden


class OuterCache(nn.Module):
    """In pieces, since data decide; the piece below fills the dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = FillsDict()

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        return self.inner(x, cache) if x.sum() < 1e9 else x


class Cells:
    """A cache of a class of its own, which pytree knows."""

    def __init__(self) -> None:
        self.cells: dict[str, Tensor] = {}


pytree.register_pytree_node(
    Cells,
    lambda cache: (list(cache.cells.values()), tuple(cache.cells)),
    lambda values, names: _cells(dict(zip(names, values, strict=True))),
    serialized_type_name="tests.Cells",
    flatten_with_keys_fn=lambda cache: (
        [(pytree.MappingKey(k), v) for k, v in cache.cells.items()],
        tuple(cache.cells),
    ),
)


def _cells(values: dict[str, Tensor]) -> Cells:
    cache = Cells()
    cache.cells = values
    return cache


class FillsObject(FillsDict):
    def forward(self, x: Tensor, cache: Any) -> Tensor:
        return super().forward(x, cache.cells)


WRITING: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Callable[[Any], Any]]] = {
    "dictionary": (FillsDict, dict, lambda c: c),
    "list": (AppendsList, list, lambda c: c),
    "in pieces": (OuterCache, dict, lambda c: c),
    "registered object": (FillsObject, Cells, lambda c: c.cells),
}


@pytest.mark.parametrize("name", WRITING)
def test_arguments_are_changed_as_the_model_changes_them(name: str) -> None:
    build, make, held = WRITING[name]
    model = seeded(build).eval()
    quantizer = Quantizer("reference")
    proxies = [quantizer.calib(model), None, None]
    caches, reference = [make() for _ in range(3)], [make() for _ in range(3)]
    for i in range(3):
        if i:
            proxies[i] = quantizer.amp(model) if i == 1 else quantizer.quantize(model)
        for step in range(3):
            x = normal(2, 4 - step, 16, salt=step) if name != "list" else normal(2, 16, salt=step)
            actual, expected = proxies[i](x, caches[i]), model(x, reference[i])
            if name == "list":
                assert (actual[1] is caches[i]) == (i != 1)  # AMP runs on copies
                actual, expected = actual[0], expected[0]
            assert torch.equal(actual, expected) if i < 2 else sqnr(expected, actual) > 20
        mine, theirs = (pytree.tree_leaves(held(c[i])) for c in (caches, reference))
        assert len(mine) == len(theirs)
        for one, two in zip(mine, theirs, strict=True):
            assert torch.equal(one, two) if i < 2 else sqnr(two, one) > 20
            assert not one.requires_grad


class Reaches(nn.Module):
    """Its Python code calls parts of a child, and methods of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.head(self.body.decoder(x) + self.body.project(x))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.proj = nn.Linear(16, 16)

    def project(self, x: Tensor) -> Tensor:
        return self.proj(x) * self.proj.weight.mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_child_that_glue_calls_are_quantized(backend: str) -> None:
    model, x = seeded(Reaches).eval(), normal(8, 16)
    quantizer = Quantizer(backend)
    assert torch.equal(quantizer.calib(model)(x), model(x))
    quant_model = quantizer.quantize(model)
    assert set(quantizer.plan.quantized) == {"head", "body.decoder.0", "body.proj"}
    assert sqnr(model(x), quant_model(x)) > 25
    assert torch.equal(copy.deepcopy(quant_model)(x), quant_model(x))


class AsksItsDtype(nn.Module):
    """As ``PreTrainedModel.dtype`` and ``.device`` do, in code that cannot be one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parameter = next(self.parameters())
        y = self.linear(x.to(parameter.dtype).to(parameter.device))
        return y if y.sum() < 1e9 else x


def test_glue_may_ask_for_its_parameters() -> None:
    model, x = seeded(AsksItsDtype).eval(), normal(4, 16)
    quantizer = Quantizer("reference")
    assert torch.equal(quantizer.calib(model)(x), model(x))
    assert sqnr(model(x), quantizer.quantize(model)(x)) > 25


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(16, 16), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


def test_an_attribute_that_changes_after_capture() -> None:
    model, x = seeded(Scaled).eval(), normal(4, 16)
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    calib_model(x)
    earlier = quantizer.quantize(model)
    expected = earlier(x)
    model.scale = 3.0
    with pytest.raises(NotCalibrated, match="scale of the model changed"):
        quantizer.quantize(model)
    assert torch.equal(calib_model(x), model(x))
    assert sqnr(model(x), quantizer.quantize(model)(x)) > 25
    assert torch.equal(earlier(x), expected)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_run_once_a_call_on_real_data(backend: str) -> None:
    model, x = seeded(Hooked).eval(), normal(4, 16)
    seen: list[tuple[str, bool]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, *rest: seen.append((name, type(args[0]) is Tensor))

    model.register_forward_pre_hook(note("before all"))
    model.first.register_forward_hook(note("first"))
    model.second.register_forward_hook(lambda module, args, output: output * 2)
    once = [("before all", True), ("first", True)]
    expected = model(x)
    assert seen == once
    quantizer = Quantizer(backend)
    calib_model = quantizer.calib(model)
    for make in (lambda m: calib_model, lambda m: calib_model, quantizer.amp, quantizer.quantize):
        proxy = make(model)
        seen.clear()
        outputs = proxy(x)
        assert seen == once
        assert sqnr(expected, outputs) > 25
        if proxy is calib_model:
            assert torch.equal(outputs, expected)
    assert set(quantizer.plan.quantized) == {"first", "second"}


def test_a_hook_that_comes_later() -> None:
    model, x = seeded(Hooked).eval(), normal(4, 16)
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    calib_model(x)
    handle = model.first.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(calib_model(x), model(x))
    handle.remove()
    assert torch.equal(calib_model(x), model(x))


class LooksBack(nn.Module):
    """In pieces; reads what the last call of a child has left in an attribute of the child."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.head = Leaves(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.child(x)
        return self.head(y + self.child.last) if y.sum() < 1e9 else y


class Leaves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.inner(x).tanh()
        return self.last * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_glue_reads_what_a_child_has_left(backend: str) -> None:
    model, x = seeded(LooksBack).eval(), normal(4, 16)
    quantizer = Quantizer(backend)
    calib_model = quantizer.calib(model)
    for batch in (4, 2):
        assert torch.equal(calib_model(normal(batch, 16)), model(normal(batch, 16)))
    assert quantizer.state.batches == 2
    quant_model = quantizer.quantize(model)
    assert set(quantizer.plan.quantized) == {"child.inner", "head"}
    assert sqnr(model(x), quant_model(x)) > 25
    later = Quantizer(backend)
    later.load_state_dict(quantizer.state_dict())
    again = later.quantize(seeded(LooksBack).eval(), example_inputs=x)
    assert torch.equal(again(x), quant_model(x))


class Counted(nn.Module):
    """In pieces; looks up by the class of its child what to do, and finds a stand-in."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.child(x)
        return self.head(y * 3 if isinstance(self.child, nn.Linear) else y) if y.sum() < 1e9 else y


def test_a_difference_on_the_first_call_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), seeded(Counted)).eval(), normal(4, 16)
    quantizer = Quantizer("reference")
    assert torch.equal(quantizer.calib(model)(x), model(x))
    assert "1: its pieces give another result than the module" in caplog.text
    assert quantizer.state.batches == 1
    quant_model = quantizer.quantize(model)
    assert quantizer.plan.quantized == ("0",)
    assert "1" in dict(quantizer.coverage(model).glue)
    assert sqnr(model(x), quant_model(x)) > 25


class Pooled(nn.Module):
    """As published: an encoder over padded text, and the mean over positions."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16) if norm else None)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding).mean(1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
def test_padding_is_zero_where_pytorchs_fast_path_makes_it_so(norm: bool) -> None:
    model = seeded(lambda: Pooled(norm)).eval()
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    for batch, lengths in ((3, [7, 4, 2]), (2, [5, 7])):
        x = normal(batch, 7, 16)
        last = torch.arange(7) >= torch.tensor(lengths)[:, None]
        with torch.no_grad():
            assert torch.equal(calib_model(x, last), model(x, last))
        assert torch.equal(calib_model(x, last), model(x, last))  # with gradients, another path
    first = last.flip(1)  # padding in front has values
    with torch.no_grad():
        assert torch.equal(calib_model(x, first), model(x, first))
        quant_model = quantizer.quantize(model)
        for mask in (last, first):
            assert sqnr(model(x, mask), quant_model(x, mask)) > 20


def test_hooks_by_which_transformers_collects_hidden_states_are_part_of_the_graph() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(**{**SMALL, "output_hidden_states": True, "num_hidden_layers": 1})
    model, ids = seeded(lambda: BertModel(config)).eval(), tokens(2, 7, 128)
    expected = model(input_ids=ids)
    calib_model = Quantizer("reference").calib(model)
    outputs = calib_model(input_ids=ids)
    assert len(outputs.hidden_states) == len(expected.hidden_states) == 2
    for mine, theirs in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(mine, theirs)
    assert not calib_model.captured.region.failure
