from __future__ import annotations

from typing import Any

import pytest
import torch
from awkward import AWKWARD
from models import MODELS, EncoderBlock, example, normal
from torch import Tensor, nn

from torch_quant.config import Overrides, QConfig
from torch_quant.core.kernels import Accepts, Kernel, KernelTable
from torch_quant.core.plan import QuantPlan
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.graph.annotate import annotate
from torch_quant.graph.examples import run_example
from torch_quant.graph.rules import modules_of
from torch_quant.model import CapturedModel
from torch_quant.module_filter import ModuleFilter
from torch_quant.ops.table import OPERATORS

WEIGHT = QuantSpec.of(signed=True, symmetric=True, per_channel=True)
KERNELS = KernelTable(
    "everything",
    tuple(Kernel(op, Accepts(QuantSpec()), Accepts(WEIGHT)) for op in OPERATORS),
)


def captured(name: str) -> tuple[nn.Module, CapturedModel]:
    """A model of ``models`` or ``awkward``, captured on its example."""
    if name in MODELS:
        model, args, kwargs = MODELS[name](), example(name), {}
    else:
        model = AWKWARD[name].build()
        args, kwargs = AWKWARD[name].inputs(2)
    assert not kwargs
    found = CapturedModel(model)
    run_example(found.root, args)
    return model, found


def plan_of(
    name: str,
    *,
    kernels: KernelTable = KERNELS,
    qconfig: QConfig | None = None,
    overrides: Overrides | None = None,
    **filters: Any,
) -> QuantPlan:
    model, found = captured(name)
    return annotate(
        found.sites(),
        model,
        kernels,
        qconfig=qconfig or QConfig(),
        overrides=overrides or {},
        module_filter=ModuleFilter(**filters),
    )


def reasons(plan: QuantPlan) -> dict[str, str]:
    assert all(bool(site.reason) != site.quantized for site in plan.values())
    return {site.name: site.reason for site in plan.values() if not site.quantized}


def test_everything_by_default_in_the_kernels_formats() -> None:
    plan = plan_of("attention_explicit")
    assert list(plan) == ["query", "key", "value", "matmul", "matmul_1", "out"]
    assert not reasons(plan)
    assert all(site.activation == QuantSpec() for site in plan.values())
    assert plan["query"].weight == WEIGHT
    assert plan["matmul"].weight is None
    assert len(plan["matmul"].inputs) == 2
    assert all(site.macs > 0 for site in plan.values())


def test_an_embedding_has_no_activation_and_attention_lists_what_is_inside() -> None:
    plan = plan_of("tiny_transformer")
    assert plan["tokens"].activation is None
    assert plan["tokens"].weight == WEIGHT
    name = "blocks.0.scaled_dot_product_attention"
    assert plan[name].inputs[3:] == (f"{name}.probabilities",)


FILTERS: dict[str, tuple[dict[str, Any], set[str], str]] = {
    "exclude a name": ({"exclude_names": "block.conv1"}, {"block.conv1"}, "excluded by name"),
    "exclude a module": (
        {"exclude_names": "block"},
        {"block.conv1", "block.conv2"},
        "excluded by name",
    ),
    "exclude a glob": (
        {"exclude_names": ("*conv*",)},
        {"conv", "block.conv1", "block.conv2"},
        "excluded by name",
    ),
    "include a name": (
        {"include_names": "block"},
        {"conv", "head"},
        "not included",
    ),
    "exclude beats include": (
        {"include_names": "block", "exclude_names": "block.conv1"},
        {"conv", "head", "block.conv1"},
        "",
    ),
    "exclude beats the very name": (
        {"include_names": "head", "exclude_names": "head"},
        {"conv", "block.conv1", "block.conv2", "head"},
        "",
    ),
    "exclude a class": (
        {"exclude_classes": nn.Conv2d},
        {"conv", "block.conv1", "block.conv2"},
        "excluded by class",
    ),
    "exclude an op type": ({"exclude_op_types": "linear"}, {"head"}, "excluded by op type"),
    "include a class": (
        {"include_classes": nn.Linear},
        {"conv", "block.conv1", "block.conv2"},
        "not included",
    ),
    "include an op type": ({"include_op_types": "conv2d"}, {"head"}, "not included"),
    "a name beats a class": (
        {"include_names": "block.conv1", "exclude_classes": nn.Conv2d},
        {"conv", "block.conv2", "head"},
        "",
    ),
    "a name beats an op type": (
        {"include_names": "conv", "exclude_op_types": "conv2d"},
        {"block.conv1", "block.conv2", "head"},
        "",
    ),
    "exclude a class beats include an op type": (
        {"exclude_classes": nn.Conv2d, "include_op_types": "conv2d"},
        {"conv", "block.conv1", "block.conv2", "head"},
        "",
    ),
}


@pytest.mark.parametrize("case", FILTERS)
def test_filters(case: str) -> None:
    filters, floats, reason = FILTERS[case]
    found = reasons(plan_of("small_cnn", **filters))
    assert set(found) == floats
    if reason:
        assert set(found.values()) == {reason}


def test_a_class_covers_everything_inside_its_instances() -> None:
    plan = plan_of("tiny_transformer", exclude_classes=EncoderBlock)
    assert set(plan.quantized) == {"tokens", "positions", "head"}


def test_a_name_covers_later_calls() -> None:
    plan = plan_of("reused_linear", exclude_names="l0")
    assert set(reasons(plan)) == {"l0", "l0@1", "l0@2"}
    assert set(reasons(plan_of("reused_linear", exclude_names="l0@1"))) == {"l0@1"}


LOW = QConfig(input=QuantSpec.of(bits=6), weight=QuantSpec.of(bits=4, signed=True, symmetric=True))
MID = QConfig(input=QuantSpec.of(bits=7))


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ({"block.conv1": LOW}, {"block.conv1"}),
        ({"block": LOW}, {"block.conv1", "block.conv2"}),
        ({"*conv[12]": LOW}, {"block.conv1", "block.conv2"}),
        ({nn.Linear: LOW}, {"head"}),
        ({"conv2d": LOW}, {"conv", "block.conv1", "block.conv2"}),
        ({"linear": LOW, nn.Linear: MID}, set()),
        ({nn.Linear: MID, "head": LOW, "linear": MID}, {"head"}),
        ({"*": LOW, "head": MID}, {"conv", "block.conv1", "block.conv2"}),
        ({"head": MID, "*": LOW}, {"conv", "block.conv1", "block.conv2"}),
        ({"conv": LOW, "conv2d": MID}, {"conv"}),
    ],
    ids=[
        "name", "module", "glob", "class", "op type", "class beats op type", "name beats class",
        "name beats glob before it", "name beats glob behind it", "name beats op type",
    ],
)  # fmt: skip
def test_overrides(overrides: Overrides, changed: set[str]) -> None:
    plan = plan_of("small_cnn", overrides=overrides)
    assert {site.name for site in plan.values() if site.activation == LOW.input} == changed
    assert {site.name for site in plan.values() if site.weight == LOW.weight} == changed
    assert not reasons(plan)


@pytest.mark.parametrize("key", ["head", nn.Linear, "linear"], ids=str)
def test_an_override_of_none_leaves_a_site_in_float(key: Any) -> None:
    found = reasons(plan_of("small_cnn", overrides={key: None}))
    assert found == {"head": "left in float by an override"}


def test_the_default_configuration_goes_before_the_kernels() -> None:
    plan = plan_of("small_cnn", qconfig=LOW)
    assert {(site.activation, site.weight) for site in plan.values()} == {(LOW.input, LOW.weight)}
    plan = plan_of("small_cnn", qconfig=MID)
    assert {(site.activation, site.weight) for site in plan.values()} == {(MID.input, WEIGHT)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude_names": "block.cnov1"}, r"'block\.cnov1' matches nothing.*block\.conv1"),
        ({"include_names": "haed"}, r"ModuleFilter name 'haed'.*did you mean head"),
        ({"overrides": {"hed": None}}, r"override 'hed'.*did you mean head"),
        ({"exclude_op_types": "conv4d"}, r"unknown op type 'conv4d'.*conv2d"),
        ({"include_op_types": "Linear"}, r"unknown op type 'Linear'; expected one of .*linear"),
    ],
    ids=["exclude", "include", "override", "op type", "op type case"],
)
def test_names_that_match_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        plan_of("small_cnn", **options)


def test_names_of_modules_that_hold_no_site_are_known() -> None:
    assert not reasons(plan_of("small_cnn", exclude_names="bn", overrides={"block.bn1": None}))


def test_what_the_backend_has_no_kernel_for() -> None:
    only = KernelTable("linears", (Kernel("linear", Accepts(QuantSpec()), Accepts(WEIGHT)),))
    found = reasons(plan_of("small_cnn", kernels=only))
    assert set(found) == {"conv", "block.conv1", "block.conv2"}
    assert set(found.values()) == {"linears has no int8 kernel for conv2d"}


def test_formats_that_no_kernel_takes() -> None:
    eight = Accepts(QuantSpec(), lambda spec: spec.bits == 8, "we want 8 bits")
    strict = KernelTable(
        "strict",
        (
            Kernel("linear", eight, Accepts(WEIGHT)),
            *(row for row in KERNELS.rows if row.op != "linear"),
        ),
    )
    found = reasons(plan_of("small_cnn", kernels=strict, overrides={"head": LOW}))
    assert found == {"head": f"we want 8 bits, not {LOW.input}"}


def test_the_first_kernel_that_takes_the_wish_is_used() -> None:
    """Each is asked with its own formats where the user wants none in particular."""
    four = QuantSpec.of(bits=4, signed=True, symmetric=True, per_channel=True)
    narrow = Kernel("linear", Accepts(QuantSpec()), Accepts(four, lambda s: s.bits == 4, "4 bits"))
    table = KernelTable("two", (narrow, *KERNELS.rows))
    assert plan_of("small_cnn", kernels=table)["head"].weight == four
    plan = plan_of("small_cnn", kernels=table, overrides={"head": QConfig(weight=WEIGHT)})
    assert plan["head"].quantized
    assert plan["head"].weight == WEIGHT
    assert table.choose("linear", QuantSpec(), WEIGHT)[0] is KERNELS.of("linear")[0]


def test_fallen_back() -> None:
    plan = plan_of("small_cnn", exclude_names="head").without(["conv", "head"])
    assert reasons(plan) == {"conv": "fallen back", "head": "excluded by name"}


def test_a_graphs_own_obstacle_comes_first() -> None:
    plan = plan_of("in_place_after_read", exclude_names="l1")
    assert "written to in place" in reasons(plan)["l1"]


def test_modules_of_a_site() -> None:
    model, found = captured("tiny_transformer")
    sites = {site.name: site for site, _ in found.sites()}
    modules = modules_of(model, sites["blocks.1.up"])
    assert modules == (model, model.blocks, model.blocks[1], model.blocks[1].up)
    attention = sites["blocks.1.scaled_dot_product_attention"]
    assert modules_of(model, attention) == modules[:3]
    model, found = captured("reused_linear")
    assert {modules_of(model, site) for site, _ in found.sites()} == {(model, model.l0)}


@pytest.mark.parametrize("name", ["branch_on_data", "checks_values"])
def test_modules_of_a_site_in_a_piece(name: str) -> None:
    """Classes count where the model is captured in pieces as where it is captured whole."""
    model, found = captured(name)
    for site, _ in found.sites():
        assert modules_of(model, site) == (model, getattr(model, site.name))
    assert not plan_of(name, exclude_classes=nn.Linear).quantized
    assert not plan_of(name, overrides={nn.Linear: None}).quantized


class NamedAsAnOp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.linear(x))


def test_op_types_are_never_module_names_in_a_filter() -> None:
    model = NamedAsAnOp()
    found = CapturedModel(model)
    with torch.no_grad():
        run_example(found.root, normal(2, 16))
    plan = annotate(
        found.sites(),
        model,
        KERNELS,
        qconfig=QConfig(),
        overrides={},
        module_filter=ModuleFilter(exclude_names="linear"),
    )
    assert plan.quantized == ("other",)
