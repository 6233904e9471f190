from __future__ import annotations

import io
import operator
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from awkward import AWKWARD
from capturing import Compute, Two, canonical, capture, shared
from models import MODELS, example, normal, seeded
from thinning import third
from torch import Tensor, fx, nn

from torch_quant import Quantizer
from torch_quant.graph.calls import flatten_call
from torch_quant.graph.serialize import pack, unpack
from torch_quant.ops.qdq import DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR


def through_pickle(gm: fx.GraphModule) -> fx.GraphModule:
    return unpack(pickle.loads(pickle.dumps(pack(gm))))


def assert_same(first: fx.GraphModule, second: fx.GraphModule, *inputs: Tensor) -> None:
    """On copies: a graph may write to its inputs."""
    results = [gm(*(x.clone() for x in inputs)) for gm in (first, second)]
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


@pytest.mark.parametrize("name", MODELS)
def test_equal_outputs_and_nodes(name: str) -> None:
    gm = canonical(MODELS[name](), *example(name))
    again = through_pickle(gm)
    assert_same(gm, again, *example(name, 3))
    assert [n.name for n in again.graph.nodes] == [n.name for n in gm.graph.nodes]
    assert [n.target for n in again.graph.nodes] == [n.target for n in gm.graph.nodes]
    again.graph.lint()


def test_packing_shares_tensors() -> None:
    model = MODELS["mlp"]()
    gm = unpack(pack(canonical(model, normal(2, 16))))
    assert gm.get_parameter("0.weight") is model[0].weight


def test_the_payload_survives_torch_save() -> None:
    gm = canonical(MODELS["small_cnn"](), *example("small_cnn"))
    file = io.BytesIO()
    torch.save(pack(gm), file)
    file.seek(0)
    assert_same(gm, unpack(torch.load(file, weights_only=False)), *example("small_cnn", 3))


def test_sizes_stay_dynamic() -> None:
    """What ``fx.GraphModule``'s own pickling cannot do: a size given to a factory function."""
    model = Compute(lambda x: x + torch.arange(x.shape[1], dtype=x.dtype)[None] / x.shape[1] ** 0.5)
    gm = through_pickle(capture(model, normal(2, 6)).gm)
    assert torch.equal(gm(normal(3, 9))[0], model(normal(3, 9)))


def test_every_kind_of_argument() -> None:
    def compute(x: Tensor) -> Tensor:
        y = torch.cat([x[1:, ::2], x[:-1, ::2]], dim=0).to(torch.float64)
        y = y.clamp(-1.0, torch.inf).to(memory_format=torch.contiguous_format)
        return torch.where(y > 0, y, torch.full_like(y, 0.25, dtype=torch.float64)).float()

    gm = canonical(Compute(compute), normal(4, 6))
    assert_same(gm, through_pickle(gm), normal(5, 8))


def test_nodes_of_every_kind() -> None:
    root = nn.Module()
    root.child = nn.Module()
    root.child.register_buffer("scale", torch.tensor(3.0))
    graph = fx.Graph()
    x = graph.placeholder("x")
    scale = graph.get_attr("child.scale")
    product = graph.call_method("mul", (x, scale))
    pair = graph.call_function(torch.ops.aten.split.Tensor, (product, 2), {"dim": 0})
    first = graph.call_function(operator.getitem, (pair, 0))
    codes = graph.call_function(QUANTIZE_PER_TENSOR, (first, 0.5, 3, 0, 255, torch.uint8))
    real = graph.call_function(DEQUANTIZE_PER_TENSOR, (codes, 0.5, 3))
    graph.output(((real, None), {"size": 2, "codes": codes}))
    gm = fx.GraphModule(root, graph)
    (values, none), rest = gm(normal(4, 3))
    (again, also_none), others = through_pickle(gm)(normal(4, 3))
    assert torch.equal(values, again)
    assert none is None
    assert also_none is None
    assert others["size"] == rest["size"] == 2
    assert torch.equal(others["codes"], rest["codes"])


class NoAutocast(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = self.l0(x)
        return self.l1(x)


class Cond(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.l0, self.l1, (x,))


def test_graphs_that_hold_graphs() -> None:
    check(NoAutocast)


def alone(statement: str) -> None:
    """In a process of its own: Dynamo, which ``torch.cond`` runs, keeps what other tests traced."""
    here = Path(__file__).parent
    code = f"import test_serialize; test_serialize.{statement}"
    paths = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths}
    )


@pytest.mark.long("a process of five seconds")
def test_a_model_with_branches_is_one_graph_and_still_runs_afterwards() -> None:
    alone("check(test_serialize.Cond); test_serialize.quantized_branches()")


def quantized_branches() -> None:
    model, x = seeded(Cond).eval(), normal(4, 16)
    calib_model = Quantizer("reference").calib(model)
    with torch.no_grad():
        for each in (x, -x):
            assert torch.equal(calib_model(each), model(each))
        assert not calib_model.captured.root.failure
        fresh = seeded(Cond, seed=1).eval()
        assert fresh(x).shape == (4, 16)  # in the user's hands, torch.cond works as before


def check(build: Callable[[], nn.Module]) -> None:
    gm = canonical(build(), normal(2, 16))
    again = through_pickle(gm)
    for batch in (1, 2, 3):
        assert_same(gm, again, normal(batch, 16))


@pytest.mark.sparse
@pytest.mark.parametrize("name", third([e.name for e in AWKWARD.values() if e.exports], 2))
def test_awkward_graphs(name: str) -> None:
    entry = AWKWARD[name]
    args, kwargs = entry.inputs(2)
    gm = shared(entry.build(), *args, **kwargs).gm
    assert_same(gm, through_pickle(gm), *flatten_call(args, kwargs).tensors)
