from __future__ import annotations

import pytest
import torch
from awkward import AWKWARD, PlainCache
from capturing import Compute, Two, executor
from models import mlp, normal, small_cnn
from thinning import third
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant.errors import CaptureFailed
from torch_quant.graph.capture import CapturedModule
from torch_quant.graph.executor import glue
from torch_quant.graph.export import ModelRefuses
from torch_quant.graph.outputs import flatten_output
from torch_quant.graph.running import no_fastpath

pytestmark = pytest.mark.sparse


def captured_paths(submodule: CapturedModule) -> set[str]:
    """The captured modules that hold a graph."""
    return {part.path for part in submodule.walk() if part.graphs}


def same_leaves(actual: object, expected: object) -> bool:
    first, second = flatten_output(actual)[0], flatten_output(expected)[0]
    return len(first) == len(second) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y
        for x, y in zip(first, second, strict=True)
    )


@pytest.mark.sparse
@pytest.mark.parametrize("name", third(AWKWARD, 1))  # test_zoo captures half of them
def test_awkward_models_run_as_captured(name: str) -> None:
    """At two batch sizes, captured at the first; bit for bit, as the operators are the same."""
    entry = AWKWARD[name]
    model = entry.build()
    run, submodule = executor(model)
    for batch in (1, 3):
        args, kwargs = entry.inputs(batch)
        again, again_kwargs = entry.inputs(batch)
        with no_fastpath():
            expected = model(*again, **again_kwargs)
        assert same_leaves(run(*args, **kwargs), expected)
    # A dataclass among the outputs is taken apart here, which torch.export alone does not do.
    assert bool(submodule.failure) != (entry.exports or name == "dataclass_output")


def test_a_model_that_exports_is_one_captured_module() -> None:
    run, submodule = executor(small_cnn())
    run(torch.zeros(1, 3, 16, 16))
    run(torch.zeros(4, 3, 16, 16))
    run(x=torch.zeros(2, 3, 16, 16))  # the same call, written otherwise
    assert captured_paths(submodule) == {""}
    assert len(submodule.graphs) == 1
    assert not submodule.children


class Gated(nn.Module):
    """Data decides at the top only; everything below exports."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = mlp()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(10, 10), nn.ReLU()) for _ in range(2)])
        self.choices = nn.ModuleDict({"low": nn.Linear(10, 4), "high": nn.Linear(10, 4)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        name = "high" if x.sum() > 0 else "low"
        return self.choices[name](x)


def test_pieces_are_as_large_as_possible() -> None:
    model = Gated().eval()
    run, submodule = executor(model)
    assert torch.equal(run(normal(4, 16)), model(normal(4, 16)))
    assert "data-dependent" in submodule.failure
    assert set(submodule.children) == {
        "stem",
        "blocks.0",
        "blocks.1",
        "choices.low",
        "choices.high",
    }
    taken = captured_paths(submodule)
    assert taken - {"choices.low", "choices.high"} == {"stem", "blocks.0", "blocks.1"}
    assert len(taken) == 4


def test_a_part_that_fails_is_split_further() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Gated(), nn.Linear(4, 4)).eval()
    run, submodule = executor(model)
    assert torch.equal(run(normal(2, 16)), model(normal(2, 16)))
    assert {"0", "2", "1.stem", "1.blocks.0", "1.blocks.1"} < captured_paths(submodule)
    assert submodule.failure
    assert submodule.children["1"].failure
    assert not submodule.children["0"].failure


def test_branches_are_captured_when_first_taken() -> None:
    entry = AWKWARD["branch_switches"]
    model = entry.build()
    run, submodule = executor(model)
    run(*entry.inputs(1)[0])
    first = captured_paths(submodule)
    assert "l1" in first
    assert not submodule.children["l2"].called
    run(*entry.inputs(3)[0])
    assert captured_paths(submodule) == {*first, "l2"}
    assert len(submodule.children["l0"].graphs) == 1


def test_a_cache_of_the_callers_comes_back_as_from_the_model() -> None:
    entry = AWKWARD["cache_argument"]
    model = entry.build()
    run, submodule = executor(model)
    cache, same = PlainCache(), PlainCache()
    for length in (3, 1, 4):
        x = normal(2, length, 16)
        assert torch.equal(run(x, cache), model(x, same))
    assert "PlainCache" in submodule.failure
    assert cache.states.keys() == same.states.keys()
    assert all(torch.equal(cache.states[i], same.states[i]) for i in same.states)
    assert {"layers.0.query", "layers.1.state"} < captured_paths(submodule)


def test_a_cache_inside_is_no_obstacle() -> None:
    entry = AWKWARD["cache_within"]
    run, submodule = executor(entry.build())
    run(*entry.inputs(2)[0])
    assert captured_paths(submodule) == {""}


def test_other_constants_and_ranks_make_other_graphs() -> None:
    model = Compute(lambda x, up=False: x.cumsum(-1) * (2 if up else -2))
    run, submodule = executor(model)
    x = normal(2, 3)
    for args in [(x, True), (normal(5, 4), True), (x, False), (normal(2, 3, 4), True)]:
        assert torch.equal(run(*args), model(*args))
    assert len(submodule.graphs) == 3


def test_a_size_that_was_fixed_makes_another_graph() -> None:
    model = Compute(lambda x: x.view(x.shape[0], 2, -1).sum(1) if x.shape[1] == 4 else x)
    run, submodule = executor(model)
    for width in (4, 6, 4):
        assert torch.equal(run(normal(3, width)), model(normal(3, width)))
    assert len(submodule.graphs) == 2


class Picky(Two):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 3:
            raise ValueError("at most 3")
        return super().forward(x)


def test_the_models_own_error_is_no_reason_to_split() -> None:
    model = Picky()
    run, submodule = executor(model)
    with pytest.raises(ModelRefuses, match="at most 3"):
        run(normal(4, 16))
    assert not submodule.failure
    assert torch.equal(run(normal(2, 16)), model(normal(2, 16)))
    assert captured_paths(submodule) == {""}


def test_a_call_that_does_not_fit_the_signature() -> None:
    run, submodule = executor(Two())
    with pytest.raises(CaptureFailed, match=r"do not fit forward\(x"):
        run(normal(2, 16), normal(2, 16))
    assert not submodule.failure


def test_what_glue_borrows_is_noted() -> None:
    entry = AWKWARD["borrows_from_child"]
    run, submodule = executor(entry.build())
    run(*entry.inputs(2)[0])
    assert submodule.children["l0"].readers.keys() == {"weight"}
    assert not submodule.children["l1"].readers
    assert not submodule.children["l0"].called


def test_unknown_attributes_stay_errors() -> None:
    run, _ = executor(Two())
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = run.no_such_thing


def test_an_executor_shows_the_models_parameters_and_owns_none() -> None:
    model = Gated().eval()
    run, _ = executor(model)
    run(normal(2, 16))
    assert [name for name, _ in run.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert not run.state_dict()
    run.double()
    assert all(x.dtype == torch.float32 for x in model.parameters())


def test_glue_replaces_the_children_and_leaves_the_model() -> None:
    model = Gated().eval()
    run, submodule = executor(model)
    run(normal(2, 16))
    made: list[str] = []

    def make(child: CapturedModule) -> nn.Module:
        made.append(child.path)
        return nn.Identity()

    twin = glue(submodule, make)
    assert sorted(made) == sorted(submodule.children)
    assert isinstance(twin.stem, nn.Identity)
    assert isinstance(twin.choices["low"], nn.Identity)
    assert isinstance(model.stem, nn.Sequential)
    assert isinstance(submodule.module.stem, nn.Sequential)


def test_a_shared_child_is_one_captured_module() -> None:
    entry = AWKWARD["loop_on_data"]
    run, submodule = executor(entry.build())
    run(*entry.inputs(2)[0])
    assert len(submodule.children["l0"].graphs) == 1
    assert [part.path for part in submodule.walk()] == ["", "l0", "l1"]


def test_inputs_pass_through_untouched() -> None:
    """Pytrees of the caller are not changed, even where the module runs as glue."""
    inputs = {"x": normal(2, 16), "extra": [None, normal(2, 16, salt=1)]}
    leaves = [id(leaf) for leaf in pytree.tree_leaves(inputs)]

    class TakesTree(Two):
        def forward(self, tree: dict[str, Tensor]) -> Tensor:
            return self.l0(tree["x"]) if tree["extra"][1].sum() > -1e9 else tree["x"]

    run, submodule = executor(TakesTree())
    run(inputs)
    assert submodule.failure
    assert [id(leaf) for leaf in pytree.tree_leaves(inputs)] == leaves


class WidensByBatch(Two):
    """Takes another path for small batches, which a condition on the size tells."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.l0(x)
        return self.l1(x.relu()) if x.shape[0] > 3 else self.l1(x.sigmoid()) + x


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 8])
def test_a_branch_on_the_batch_size_makes_two_graphs_and_no_pieces(batch: int) -> None:
    model = WidensByBatch()
    run, submodule = executor(model)
    for size in (batch, 2, 6, 3, 8):
        assert torch.equal(run(normal(size, 16)), model(normal(size, 16)))
    assert not submodule.failure
    assert len(submodule.graphs) == 2
