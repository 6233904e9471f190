"""The quantized weights of a model as plain integers, whatever backend the model is for."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.backends.quantized import QuantizedModule, plan_of, quantized_graphs
from torch_quant.backends.quantized_graph import QuantizedGraph
from torch_quant.core.functional import dequantize_blocks
from torch_quant.core.plan import SitePlan
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.graph.sites import KEY
from torch_quant.ops.table import pattern_of

__all__ = ["QuantizedWeight", "quantized_weights"]


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight of a quantized model.

    Args:
        site: what reads it: ``model.layers.0.mlp.up_proj``.
        plan: what is done with that.
        codes: integers, one an element, in the shape of the weight, ``[out, in]``.
        scale: float32, in the shape of the blocks' grid: ``[out, in / 128]``.
        zero_point: int32, the same shape.
        names: what the tensors are called in the ``state_dict``: codes and grid.
    """

    site: str
    plan: SitePlan
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    names: frozenset[str]

    @property
    def spec(self) -> QuantSpec:
        """The format."""
        assert self.plan.weight is not None
        return self.plan.weight

    @property
    def module(self) -> str:
        """The path of the module whose weight it is, where the site is a module."""
        return self.site.partition("@")[0]

    def values(self) -> Tensor:
        """What it stands for, float32."""
        return dequantize_blocks(self.codes, self.scale, self.zero_point, self.spec.element)


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The quantized weights of a model, by the module that has each.

    Args:
        model: what ``quantizer.quantize`` or ``torch_quant.load`` returned.

    Raises:
        InvalidConfig: it is no quantized model; a weight has a form that is not known here.

    >>> from torch_quant import Quantizer, recipes
    >>> quantizer = Quantizer("reference", qconfig=recipes.int4_weight_only(group_size=4))
    >>> model, x = nn.Sequential(nn.Linear(8, 2)), torch.ones(1, 8)
    >>> found = quantized_weights(quantizer.quantize(model, example_inputs=x))
    >>> {name: (each.codes.shape, each.scale.shape) for name, each in found.items()}
    {'0': (torch.Size([2, 8]), torch.Size([2, 2]))}
    """
    if not isinstance(model, QuantizedModule):
        raise InvalidConfig(
            f"expected the model that quantizer.quantize(model) returns, got {type(model).__name__}"
        )
    wanted = {
        name: site
        for name, site in plan_of(model).items()
        if site.quantized and site.weight is not None
    }
    found: dict[str, QuantizedWeight] = {}
    for module, graph in quantized_graphs(model):
        path = module.quantization.path
        for node, site in _sites(graph, path, wanted):
            each = _weight(graph.body, node, site, path)
            found.setdefault(each.module, each)
    missing = wanted.keys() - {each.site for each in found.values()} - found.keys()
    missing = {name for name in missing if name.partition("@")[0] not in found}
    if missing:
        raise InvalidConfig(
            f"the quantized weight of {', '.join(sorted(missing)[:3])} was not found in the graphs "
            "of the model: quantize it again, for Backend.REFERENCE"
        )
    return found


def _sites(
    graph: QuantizedGraph, path: str, wanted: Mapping[str, SitePlan]
) -> Iterator[tuple[fx.Node, SitePlan]]:
    """The products with quantized weights, with what the plan says of them.

    Saved graphs have no notes: there a product belongs to the module of its weight.
    """
    for node in graph.body.graph.nodes:
        if node.op != "call_function" or weight_place(node) is None:
            continue
        if KEY in node.meta:
            name = str(node.meta[KEY])
        elif (codes := _codes_node(node)) is not None and _is_integer(graph.body, codes):
            name = f"{path}.{str(codes.target).rpartition('.')[0]}".strip(".")
        else:
            continue
        if name in wanted:
            yield node, wanted[name]


def _is_integer(body: fx.GraphModule, node: fx.Node) -> bool:
    value = operator.attrgetter(str(node.target))(body)
    return isinstance(value, Tensor) and not value.is_floating_point()


def weight_place(node: fx.Node) -> int | None:
    """Which argument of a product is its weight; None if it has none."""
    pattern = pattern_of(node)
    return None if pattern is None else pattern.weight


def _codes_node(node: fx.Node) -> fx.Node | None:
    """The buffer of integers that a product's weight is computed from."""
    place = weight_place(node)
    assert place is not None
    found: Any = node.args[place]
    while isinstance(found, fx.Node) and found.op == "call_function":
        found = found.args[0] if found.args else None
    return found if isinstance(found, fx.Node) and found.op == "get_attr" else None


def _weight(body: fx.GraphModule, node: fx.Node, site: SitePlan, path: str) -> QuantizedWeight:
    codes = _codes_node(node)
    if codes is None:
        raise InvalidConfig(f"{site.name}: its weight is none that the model holds as integers")
    found: dict[str, Tensor] = {}
    for ending in ("", "_scale", "_zero_point"):
        name = f"{codes.target}{ending}"
        try:
            found[name] = operator.attrgetter(name)(body)
        except AttributeError as error:
            if ending == "_zero_point":  # floats have none
                continue
            raise InvalidConfig(
                f"{site.name}: the integers {codes.target} have no scale"
            ) from error
    q, scale, *rest = found.values()
    zero_point = rest[0] if rest else torch.zeros_like(scale)
    if scale.dim() == 1:  # as int8 kernels take channels
        shape = [-1, *(1 for _ in q.shape[1:])]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    names = frozenset(f"{path}.{name}".strip(".") for name in found)
    return QuantizedWeight(site.name, site, q, scale, zero_point.to(torch.int32), names)
