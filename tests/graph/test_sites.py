from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD
from capturing import Compute, Two, canonical, site_names, sites_of
from models import MODELS, example, normal
from thinning import third
from torch import Tensor, fx, nn

from torch_quant.graph.sites import find_sites, fused_output, is_constant, key_of, source

aten = torch.ops.aten


def test_a_module_with_one_product_lends_its_path() -> None:
    assert site_names(canonical(MODELS["small_cnn"](), *example("small_cnn"))) == [
        "conv",
        "block.conv1",
        "block.conv2",
        "head",
    ]


def test_functional_products_get_the_operator_as_well() -> None:
    model = MODELS["attention_explicit"]()
    names = site_names(canonical(model, *example("attention_explicit")))
    assert names == ["query", "key", "value", "matmul", "matmul_1", "out"]


def test_operators_in_a_module_of_modules() -> None:
    names = site_names(canonical(MODELS["tiny_transformer"](), *example("tiny_transformer")))
    assert names[:7] == [
        "tokens",
        "positions",
        "blocks.0.query",
        "blocks.0.key",
        "blocks.0.value",
        "blocks.0.scaled_dot_product_attention",
        "blocks.0.out",
    ]


def test_later_calls_of_one_module() -> None:
    entry = AWKWARD["reused_linear"]
    gm = canonical(entry.build(), *entry.inputs(2)[0])
    assert site_names(gm) == ["l0", "l0@1", "l0@2"]
    assert [site.module for site in sites_of(gm)] == ["l0", "l0@1", "l0@2"]


def test_later_calls_of_a_block_with_children() -> None:
    entry = AWKWARD["shared_block_loop"]
    names = site_names(canonical(entry.build(), *entry.inputs(2)[0]))
    assert len(set(names)) == len(names) == 7
    assert names[:2] == ["block.up", "block.down"]
    assert all("@" in name for name in names[2:6])
    assert [name.replace("@1", "").replace("@2", "") for name in names[2:6]] == names[:2] * 2


def test_the_prefix_goes_before_every_name() -> None:
    x = normal(2, 12, 16)
    plain = canonical(MODELS["attention_explicit"](), x)
    below = canonical(MODELS["attention_explicit"](), x, path="encoder.layer.0")
    assert site_names(below) == [f"encoder.layer.0.{name}" for name in site_names(plain)]
    for gm, prefix in ((plain, ""), (below, "encoder.layer.0")):
        (query, *_) = sites_of(gm)
        assert query.inputs == (f"{prefix}:args_0",)
    assert site_names(canonical(nn.Linear(16, 4), x, path="head")) == ["head"]


def test_a_model_that_is_one_operator_has_a_name() -> None:
    assert site_names(canonical(nn.Linear(16, 4), normal(2, 16))) == ["linear"]


class Clashing(nn.Module):
    """Modules named as a second and third functional product would be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(16))
        self.linear_1, self.matmul_1 = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(F.linear(x, self.weight).relu(), self.weight)
        x = torch.matmul(torch.matmul(x, x.transpose(1, 2)).softmax(-1), x)
        return self.matmul_1(self.linear_1(x))


def test_names_stay_unique_whatever_modules_are_called() -> None:
    names = site_names(canonical(Clashing(), normal(2, 5, 16)))
    assert len(names) == 6
    assert len(set(names)) == 6
    assert {"linear_1", "matmul_1"} <= set(names)


@pytest.mark.parametrize(
    "name", [*MODELS, *third([e.name for e in AWKWARD.values() if e.exports], 0)]
)
def test_every_tensor_has_a_key_of_its_own(name: str) -> None:
    """And the same at each capture, for another batch size too."""
    seen = []
    for batch in (2, 3):
        args, kwargs = (example(name, batch), {}) if name in MODELS else AWKWARD[name].inputs(batch)
        model = MODELS[name]() if name in MODELS else AWKWARD[name].build()
        gm = canonical(model, *args, **kwargs)
        keys = [key_of(node) for node in gm.graph.nodes if node.op != "output"]
        assert len(set(keys)) == len(keys)
        sites = sites_of(gm)
        assert len({site.name for site in sites}) == len(sites)
        inside = {key for site in sites for key in site.internals}
        assert {key for site in sites for key in site.keys} - inside <= set(keys)
        assert not inside & set(keys)
        seen.append((keys, [(s.name, s.op, s.module, s.keys) for s in sites]))
    assert seen[0] == seen[1]


def test_what_only_moves_data_keeps_the_key() -> None:
    def compute(x: Tensor) -> Tensor:
        y = x.sigmoid()
        return y.transpose(1, 2).reshape(2, 8, -1).permute(0, 2, 1) @ y.flip(1)

    (site,) = sites_of(canonical(Compute(compute), normal(2, 8, 8)))
    assert site.inputs == ("sigmoid", "sigmoid")


def test_parts_have_keys_of_their_own() -> None:
    """Q, K and V of one projection are on scales of their own."""

    class Fused(Two):
        def forward(self, x: Tensor) -> Tensor:
            q, k = self.l0(x).chunk(2, -1)
            return q @ k.transpose(1, 2)

    _, product = sites_of(canonical(Fused(), normal(2, 5, 16)))
    assert len(set(product.inputs)) == 2
    assert "l0" not in product.inputs


def test_an_activation_function_behind_is_part_of_the_output() -> None:
    gm = canonical(Two(), normal(2, 16))
    first, second = sites_of(gm)
    assert first.output == "relu"
    assert second.inputs == ("relu",)
    assert second.output == "l1"


def test_an_activation_function_is_fused_only_if_nothing_else_reads_the_product() -> None:
    class Branches(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = self.l0(x)
            return self.l1(y.relu()) + y

    first, _ = sites_of(canonical(Branches(), normal(2, 16)))
    assert first.output == "l0"


@pytest.mark.parametrize("name", ["dynamic_weight", "integer_math", "einsums"])
def test_what_is_no_site(name: str) -> None:
    """Weights that are activations count as a second operand; integers and einsum not at all."""
    entry = AWKWARD[name]
    sites = sites_of(canonical(entry.build(), *entry.inputs(2)[0]))
    expected = {
        "dynamic_weight": {"make": "linear", "bmm": "matmul", "head": "linear"},
        "integer_math": {
            "words": "embedding",
            "places": "embedding",
            "mix": "linear",
            "head": "linear",
        },
        "einsums": {},
    }
    assert {site.name: site.op for site in sites} == expected[name]


def test_a_linear_with_an_activation_for_a_weight_is_no_site() -> None:
    model = Compute(lambda x, w: F.linear(x, w.tanh()))
    assert not sites_of(canonical(model, normal(2, 16), normal(4, 16)))


def test_products_of_integers_are_no_sites() -> None:
    model = Compute(lambda x: torch.matmul(x, x))
    assert not sites_of(canonical(model, torch.ones(3, 3, dtype=torch.int64)))
    assert len(sites_of(canonical(model, normal(3, 3)))) == 1


def test_constants() -> None:
    entry = AWKWARD["scaled_weight"]
    gm = canonical(entry.build(), *entry.inputs(2)[0])
    (product,) = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert is_constant(product)
    (x,) = gm.graph.find_nodes(op="placeholder")
    assert not is_constant(x)
    assert not any(is_constant(node) for node, _, _ in find_sites(gm.graph))


def test_constants_of_long_chains() -> None:
    graph = fx.Graph()
    ends = [graph.placeholder("x"), graph.get_attr("weight")]
    for _ in range(3000):  # a call for each would be too many for Python
        ends = [graph.call_function(aten.relu.default, (each,)) for each in ends]
    mixed = graph.call_function(aten.add.Tensor, (ends[1], ends[0]))
    assert [is_constant(each) for each in (*ends, mixed)] == [False, True, False]


def test_a_buffer_that_is_written_to_is_no_constant() -> None:
    class Learns(Two):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.eye(16))

        def forward(self, x: Tensor) -> Tensor:
            self.table.mul_(0.5)
            return F.linear(self.l0(x), self.table)

    assert site_names(canonical(Learns(), normal(2, 16))) == ["l0"]


def test_source_stops_at_the_first_operator_that_computes() -> None:
    gm = canonical(Compute(lambda x: (x + 1).unsqueeze(0).flatten()), normal(4))
    output = next(iter(reversed(gm.graph.nodes)))
    (last,) = output.args[0]
    assert source(last).target is aten.add.Tensor
    assert fused_output(source(last)) is source(last)
