"""Graphs, nests and sizes as JSON: they come back the same; what was tampered with is refused."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import AWKWARD
from capturing_once import exported
from models import MODELS, example, normal
from thinning import third
from torch import Tensor, fx, nn

from torch_quant.errors import InvalidConfig
from torch_quant.graph.calls import flatten_call
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.outputs import flatten_output, leaf_names, unflatten_output
from torch_quant.graph.twin import twin_of
from torch_quant.graph.widen import export_call
from torch_quant.io.data.graphs import read_graph, write_graph
from torch_quant.io.data.sizes import read_contract, write_contract
from torch_quant.io.data.trees import read_kind, read_output, write_kind, write_output
from torch_quant.io.data.values import class_at, decode, encode, operator_at
from torch_quant.passes.canonicalize import canonicalize

Pair = namedtuple("Pair", ["left", "right"])


def canonical(model: nn.Module, *inputs: Any) -> fx.GraphModule:
    return canonicalize(captured(model, *inputs).gm)


def through(data: Any) -> Any:
    return json.loads(json.dumps(data, allow_nan=False))


def graph_through_json(gm: fx.GraphModule) -> fx.GraphModule:
    tensors: dict[str, Tensor] = {}
    data = write_graph(gm, tensors.__setitem__)
    return read_graph(through(data), "model", tensors.__getitem__)


# ---- values


VALUES: list[Any] = [
    None, True, 3, -0.0, 1e-300, math.inf, -math.inf, 2 + 3j, "x\"'\\", b"\x00\xff", torch.float16,
    torch.strided, torch.channels_last, torch.device("cpu"), slice(1, None, -2), (1, (2, [3])), [],
    (), {"a": (1,), 2: [None]}, OrderedDict(b=1, a=2), {"tuple": 1}, {},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values(value: Any) -> None:
    again = decode(through(encode(value)), "it")
    assert again == value
    assert type(again) is type(value)


def test_not_a_number_and_the_sign_of_zero() -> None:
    assert math.isnan(decode(through(encode(math.nan)), "it"))
    assert math.copysign(1.0, decode(through(encode(-0.0)), "it")) == -1.0


@pytest.mark.parametrize("value", [object(), nn.Linear(1, 1), {1, 2}, torch.ones(1), print])
def test_what_is_no_data_is_refused_by_its_class(value: Any) -> None:
    with pytest.raises(InvalidConfig, match=f"{type(value).__qualname__} is part of.*no data"):
        encode([value])


@pytest.mark.parametrize(
    "data",
    [
        {"node": "x"}, {"float": "1e400"}, {"dtype": "nn"}, {"dtype": "load"}, {"device": "moon"},
        {"bytes": "%"}, {"slice": [1]}, {"dict": [[1]]}, {"a": 1, "b": 2}, {}, {"os": "system"},
        {"complex": ["x", 1]}, {"tuple": 3},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_value_is_refused(data: Any) -> None:
    with pytest.raises((InvalidConfig, TypeError)):
        decode(data, "it")


def test_a_class_is_found_only_where_it_is_imported() -> None:
    assert class_at("torch.nn.modules.linear.Linear", "it") is nn.Linear
    with pytest.raises(InvalidConfig, match=r"this\.Zen, which is not imported"):
        class_at("this.Zen", "it")
    for path in ("os.system", "torch.nn", "a b.c", "builtins.print", 5):
        with pytest.raises(InvalidConfig):
            class_at(path, "it")


# ---- graphs


@pytest.mark.parametrize("name", MODELS)
def test_graphs(name: str) -> None:
    gm = canonical(MODELS[name](), *example(name))
    again = graph_through_json(gm)
    inputs = example(name, 3)
    for x, y in zip(gm(*inputs), again(*inputs), strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y
    assert [n.name for n in again.graph.nodes] == [n.name for n in gm.graph.nodes]
    assert [n.target for n in again.graph.nodes] == [n.target for n in gm.graph.nodes]


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,))


def check_branches() -> None:
    gm = canonical(Branch(), torch.ones(3))
    again = graph_through_json(gm)
    for x in (torch.ones(3), -torch.ones(3)):
        assert torch.equal(again(x)[0], gm(x)[0])


@pytest.mark.newest("a process of four seconds")
def test_graphs_inside_of_graphs() -> None:
    """In a process of its own: Dynamo, which ``torch.cond`` runs, keeps what other tests traced."""
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    code = "import test_saved_data; test_saved_data.check_branches()"
    environment = {**os.environ, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def tiny() -> dict[str, Any]:
    gm = canonical(nn.Linear(4, 2), normal(3, 4))
    return through(write_graph(gm, lambda name, x: None))


def of_node(op: str, entry: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        next(node for node in data["nodes"] if node[0] == op)[entry] = value

    return change


CALL = "x: __import__('os').system('touch {}') = 1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_node("placeholder", 2, CALL), "an identifier"),
        (of_node("placeholder", 1, CALL), "an identifier"),
        (of_node("get_attr", 2, 'weight"); import os; ("'), "the name of a tensor"),
        (of_node("call_function", 2, "os.system"), "os.system"),
        (of_node("call_function", 2, "function os.system"), "a function that computes"),
        (of_node("call_function", 2, "function builtins.eval"), "a function that computes"),
        (of_node("call_function", 2, "function torch.load"), "a function that computes"),
        (of_node("call_function", 2, "function torch.from_file"), "a function that computes"),
        (of_node("call_function", 2, "function torch_quant.save"), "a function that computes"),
        (of_node("call_function", 2, "aten.from_file.default"), "no saved model may call"),
        (of_node("call_function", 2, "aten.linear.newer"), "does not have"),
        (of_node("call_function", 2, "torch_quant.of_tomorrow.default"), "does not have"),
        (of_node("call_function", 2, "aten.__class__.x"), "aten.__class__.x"),
        (of_node("call_function", 3, [{"node": "nobody"}]), "one that comes before"),
        (of_node("call_function", 3, "x"), "a constant"),
        (of_node("call_function", 0, "call_module"), "op, name, target"),
        (of_node("call_function", 0, "call_method"), "a method of tensors"),
        (of_node("call_function", 4, [["a b", 1]]), "arguments by name"),
        (of_node("output", 0, "placeholder"), "one output"),
        (lambda data: data["nodes"].pop(), "one output"),
        (lambda data: data["nodes"].append(data["nodes"][0]), "once"),
        (lambda data: data.pop("graphs"), "an object with nodes, graphs"),
        (lambda data: data.update(code="import os"), "an object with nodes, graphs"),
    ],
)
def test_a_graph_that_was_tampered_with(change: Any, message: str) -> None:
    data = tiny()
    change(data)
    with pytest.raises(InvalidConfig, match=message.replace("(", r"\(")):
        read_graph(data, "model", lambda name: torch.zeros(2, 4))


# ---- nests and sizes


def captured(model: nn.Module, *inputs: Any, **kwargs: Any) -> CapturedGraph:
    return exported(twin_of(model), flatten_call(inputs, kwargs))


OUTPUTS: list[Any] = [
    torch.ones(2), [torch.ones(1), {"b": torch.zeros(1), "a": (3, None, "text", 2.5)}],
    Pair(torch.ones(1), [torch.ones(2)]), OrderedDict(z=torch.ones(1), y=True), (), None,
]  # fmt: skip


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda x: type(x).__name__)
def test_outputs(output: Any) -> None:
    leaves, spec = flatten_output(output)
    again = read_output(through(write_output(spec)), "model")
    assert leaf_names(again) == leaf_names(spec)
    assert repr(unflatten_output(leaves, again)) == repr(output)


def test_outputs_that_hold_what_the_call_was_given() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, name: str, n: int) -> Any:
            return {"y": x + 1, "name": name, "n": (n,)}

    call = flatten_call((normal(2, 3), "a", 5), {})
    wide, graph = export_call(twin_of(Named()), call)
    data = through(write_output(graph.out_spec))
    again = read_output(data, "model", wide.signature)
    leaves = graph.gm(*wide.tensors)
    found = unflatten_output(leaves, again, ((normal(2, 3), "b", 7), {}))
    assert (found["name"], found["n"]) == ("b", (7,))
    for kind in (None, call.signature):  # where no call has such
        with pytest.raises(InvalidConfig, match="expected a leaf, a constant or an object"):
            read_output(data, "model", kind)


def test_outputs_of_transformers_and_written_arguments() -> None:
    from transformers import DynamicCache
    from transformers.modeling_outputs import CausalLMOutputWithPast

    cache = DynamicCache()
    cache.update(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    output = CausalLMOutputWithPast(logits=torch.ones(1, 5), past_key_values=cache)
    for arguments in (None, {"cache": {"k": torch.ones(2)}}, {0: [torch.ones(1)]}):
        leaves, spec = flatten_output(output, arguments)
        again = unflatten_output(leaves, read_output(through(write_output(spec)), "model"))
        assert type(again) is type(output)
        assert torch.equal(again.logits, output.logits)
        assert type(again.past_key_values) is DynamicCache
        assert torch.equal(again.past_key_values.layers[0].keys, cache.layers[0].keys)


@pytest.mark.parametrize(
    "inputs",
    [
        ((torch.ones(2, 3),), {}),
        ((torch.ones(2, 3), 4, 2.5, None), {"flag": True, "name": "x", "many": [torch.ones(1)]}),
        ((Pair(torch.ones(1), torch.zeros(2)),), {"where": {"a": torch.ones(1), "b": ()}}),
    ],
    ids=["one", "constants", "nested"],
)
def test_kinds_of_calls(inputs: Any) -> None:
    call = flatten_call(*inputs)
    for each in (call, call.widened([i for i, x in enumerate(call.leaves) if type(x) is int])):
        kind = each.signature
        again = read_kind(through(write_kind(kind)), "model")
        assert again == kind
        assert again.names == kind.names
        assert again.accept(call) is not None
        assert copy.deepcopy(again) == kind


def test_sizes_that_a_graph_serves() -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            if x.shape[1] > 4 and (x.shape[0] * 2) % 4 == 0:
                return x.flatten(1)[:, : y.shape[0] // 2]
            return x[:, 0] + y.sum()

    for x, y in ((normal(2, 8), normal(6)), (normal(3, 3), normal(4))):
        contract = captured(Sized(), x, y).contract
        again = read_contract(through(write_contract(contract)), "model")
        assert (again.names, again.shapes) == (contract.names, contract.shapes)
        for rows in range(1, 7):
            for width in range(1, 9):
                call = flatten_call((normal(rows, width), normal(6)), {})
                found, expected = (each.mismatch(call) for each in (again, contract))
                assert (found is None) == (expected is None), (rows, width, found, expected)


@pytest.mark.sparse
@pytest.mark.parametrize(
    "name", third([name for name, entry in AWKWARD.items() if entry.exports], 1)
)
def test_awkward_graphs_with_all_that_belongs_to_them(name: str) -> None:
    entry = AWKWARD[name]
    model, (args, kwargs) = entry.build(), entry.inputs(2)
    call = flatten_call(args, kwargs)
    graph = exported(twin_of(model), call)
    again = CapturedGraph(
        graph_through_json(graph.gm),
        read_contract(through(write_contract(graph.contract)), name),
        read_output(through(write_output(graph.out_spec)), name),
    )
    assert again.contract.mismatch(call) is None
    # Symbols have fewer assumptions than those of torch.export, so only their text is the same.
    assert str(again.contract) == str(graph.contract)
    found, expected = (flatten_output(each(call))[0] for each in (again, graph))
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


@pytest.mark.parametrize(
    "condition",
    [
        ["Equality", "__import__('os')", 1], ["exec", "s0"], ["Equality", "s0"], "a b",
        ["Lambda", 1],
        [1, 2], {"a": 1}, ["Equality", ["Symbol", "x"], 1], None, 1.5, ["S", "1"], [],
    ],
    ids=str,
)  # fmt: skip
def test_a_condition_that_was_tampered_with(condition: Any) -> None:
    contract = captured(nn.Linear(4, 2), normal(3, 4)).contract
    data = through(write_contract(contract)) | {"conditions": [condition]}
    with pytest.raises(InvalidConfig):
        read_contract(data, "model").mismatch(flatten_call((normal(3, 4),), {}))


def test_floats_and_functions_in_conditions() -> None:
    import sympy
    from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

    s, t = (sympy.Symbol(name, integer=True) for name in ("s0", "s1"))
    contract = captured(nn.Linear(4, 2), normal(3, 4)).contract
    conditions = [
        sympy.Or(sympy.Eq(FloorDiv(s, 4), 1), sympy.Ne(Mod(s, 7), 3)), sympy.Max(s, t) < 100,
        sympy.Ge(s * t + sympy.Rational(1, 2), 1.5), sympy.Eq(PythonMod(s, 3), 0) | (s > 2),
        sympy.Not(sympy.Eq(s, 5)), sympy.Lt(s, sympy.oo), sympy.true,
    ]  # fmt: skip
    data = write_contract(replace(contract, conditions=conditions))
    assert str(read_contract(through(data), "model").conditions) == str(conditions)


def test_operators_are_the_ones_that_were_saved() -> None:
    assert operator_at("aten.linear.default", "it") is torch.ops.aten.linear.default


def nest_of(kind: str, context: Any, count: int = 1) -> dict[str, Any]:
    leaves = [{"constant": ["touch", "pwned"]}] * count
    return {"output": {"nest": [kind, context, [None] * count], "leaves": leaves, "reordered": []}}


@pytest.mark.parametrize(
    "data",
    [
        nest_of("collections.namedtuple", {"node": "subprocess.Popen"}),
        nest_of("collections.namedtuple", {"node": "builtins.tuple"}),
        nest_of("collections.namedtuple", {"node": f"{__name__}.Pair"}),  # it has two fields
        nest_of("collections.namedtuple", None),
        nest_of("collections.defaultdict", [{"node": "subprocess.Popen"}, ["a"]]),
        nest_of("subprocess.Popen", None),
        nest_of("builtins.list", {"node": "subprocess.Popen"}),
        {"output": {"nest": None, "reordered": [],
                    "leaves": [{"object": ["tempfile.TemporaryDirectory", []]}]}},
        {"output": {"nest": None, "reordered": [],
                    "leaves": [{"constant": {"node": "subprocess.Popen"}}]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_nest_calls_no_class_that_a_file_names(data: Any) -> None:
    with pytest.raises(InvalidConfig):
        read_output(data, "model")


def test_dictionaries_with_defaults_come_back() -> None:
    output = defaultdict(list, {"a": torch.ones(1)})
    leaves, spec = flatten_output(output)
    again = unflatten_output(leaves, read_output(through(write_output(spec)), "model"))
    assert again == output
    assert again.default_factory is list


@pytest.mark.parametrize(
    "name",
    ["load_library.__self__.load_library", "aten.__class__.default", "load_library.__call__.x",
     "higher_order.__init__", "aten.linear.op", "aten.linear", "aten._ops.default"],
)  # fmt: skip
def test_only_operators_are_operators(name: str) -> None:
    with pytest.raises(InvalidConfig):
        operator_at(name, "it")


@pytest.mark.parametrize(
    ("op", "target", "kwargs"),
    [
        ("call_method", "__getattribute__", []),
        ("call_method", "__reduce_ex__", []),
        ("call_method", "share_memory_", []),
        ("call_function", "function torch.__getattribute__", []),
        ("call_function", "function torch.nn.functional.__getattribute__", []),
        ("call_function", "function builtins.max", [["key", {"node": "x"}]]),
    ],
)
def test_graphs_reach_nothing_but_tensors(op: str, target: str, kwargs: Any) -> None:
    nodes = [
        ["placeholder", "x", "x", [], []],
        [op, "y", target, [{"node": "x"}], kwargs],
        ["output", "output", "output", [{"tuple": [{"node": "y"}]}], []],
    ]
    with pytest.raises(InvalidConfig):
        read_graph({"nodes": nodes, "graphs": {}}, "model", lambda name: torch.zeros(1))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "condition",
    [["Pow", 7, ["Pow", 9, 9]], ["Pow", 2, 10**7], ["LShift", 1, 10**9], ["Equality", 10**400, 1]],
    ids=str,
)
def test_conditions_take_no_time(condition: Any) -> None:
    contract = captured(nn.Linear(4, 2), normal(3, 4)).contract
    data = through(write_contract(contract)) | {"conditions": [condition]}
    with pytest.raises(InvalidConfig):
        read_contract(data, "model")


def test_operators_that_are_called_as_in_python() -> None:
    assert operator_at("aten.__and__.Tensor", "it") is torch.ops.aten.__and__.Tensor
