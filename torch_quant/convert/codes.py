"""The quantized weights of a model as plain integers, whatever backend the model is for."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.convert.quantized import (
    QuantizedModule,
    check_finished,
    plan_of,
    quantized_graphs,
)
from torch_quant.core.functional import dequantize_blocks
from torch_quant.core.granularity import PerGroup
from torch_quant.core.packing import unpack
from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.graph.sites import KEY
from torch_quant.native.ops import (
    PACKED_EMBEDDING,
    WEIGHT_ONLY_EXPERTS,
    WEIGHT_ONLY_LINEAR,
)

__all__ = ["QuantizedWeight", "quantized_weights", "weights_of"]


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight of a quantized model.

    Args:
        site: what reads it: ``model.layers.0.mlp.up_proj``.
        plan: what is done with that.
        codes: integers, one an element, in the shape of the weight, ``[out, in]``.
        scale: float32, in the shape of the blocks' grid: ``[out, in / 128]``.
        zero_point: int32, or float32 of a format with such zero points; the same shape.
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
    check_finished(model)
    return weights_of(model, plan_of(model))


def weights_of(model: nn.Module, plan: QuantPlan) -> dict[str, QuantizedWeight]:
    """The same of any module with quantized ones inside; ``plan`` is theirs."""
    wanted = {
        name: site for name, site in plan.items() if site.quantized and site.weight is not None
    }
    found: dict[str, QuantizedWeight] = {}
    for module, graph in quantized_graphs(model):
        path = module.quantization.path
        for codes, grid in _codes_of(graph.body):
            for site in _readers(codes, path, wanted):
                each = _weight(graph.body, codes, grid, site, path)
                found.setdefault(each.module, each)
    missing = wanted.keys() - {each.site for each in found.values()} - found.keys()
    missing = {name for name in missing if name.partition("@")[0] not in found}
    if missing:
        raise InvalidConfig(
            f"the quantized weight of {', '.join(sorted(missing)[:3])} was not found in the graphs "
            "of the model: quantize it again, for Backend.REFERENCE"
        )
    return found


def _codes_of(body: fx.GraphModule) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """The buffers of codes that a graph reads, each with its grid, which is called like it."""
    nodes = list(body.graph.find_nodes(op="get_attr"))  # several may read one tied weight
    known = {str(node.target): node for node in nodes}
    for node in nodes:
        names = [f"{node.target}{ending}" for ending in ("_scale", "_zero_point")]
        grid = [known[each] for each in names if each in known]
        if grid and _tensor(body, node).dtype != torch.float32:
            yield node, grid


def _tensor(body: fx.GraphModule, node: fx.Node) -> Tensor:
    found: Tensor = operator.attrgetter(str(node.target))(body)
    return found


def _readers(codes: fx.Node, path: str, wanted: Mapping[str, SitePlan]) -> Iterator[SitePlan]:
    """The sites that compute with codes.

    Saved graphs have no notes: there, codes belong to the site of their module.
    """
    noted, nodes = False, [codes]
    while nodes:
        for user in nodes.pop().users:
            if KEY in user.meta:
                noted = True
                if (name := str(user.meta[KEY])) in wanted:
                    yield wanted[name]
            else:
                nodes.append(user)
    owner = f"{path}.{str(codes.target).rpartition('.')[0]}".strip(".")
    if not noted and owner in wanted:
        yield wanted[owner]


_PACKED: dict[Any, int] = {WEIGHT_ONLY_LINEAR: 5, WEIGHT_ONLY_EXPERTS: 5, PACKED_EMBEDDING: 4}
"""Operators that read several codes in a byte -> which argument says how many bits one has."""


def _weight(
    body: fx.GraphModule, node: fx.Node, grid: list[fx.Node], site: SitePlan, path: str
) -> QuantizedWeight:
    codes, (scale, *rest) = _tensor(body, node), (_tensor(body, each) for each in grid)
    zero_point = rest[0] if rest else torch.zeros_like(scale, dtype=torch.int32)
    reader = next(iter(node.users))
    if reader.target in _PACKED and site.weight is not None:
        codes, zero_point = _unpacked(codes, scale, rest, reader, site.weight)
    if scale.dim() == 1:  # as int8 kernels take channels
        shape = [-1, *(1 for _ in codes.shape[1:])]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    names = frozenset(f"{path}.{each.target}".strip(".") for each in (node, *grid))
    dtype = torch.int32 if site.weight is None else site.weight.zero_point_dtype
    return QuantizedWeight(site.name, site, codes, scale, zero_point.to(dtype), names)


def _unpacked(
    packed: Tensor, scale: Tensor, zero_point: list[Tensor], reader: fx.Node, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Codes and zero points of the format, of a weight as this package's kernels read it."""
    arguments: list[Any] = list(reader.args)
    bits, zero = arguments[_PACKED[reader.target] :][:2]
    above = 2 ** (bits - 1) if spec.signed else 0
    codes = packed
    if bits < 8:
        inputs = packed.shape[-1] * 8 // bits
        if isinstance(spec.granularity, PerGroup):
            inputs = scale.shape[-1] * spec.granularity.size
        elif reader.target is PACKED_EMBEDDING:
            inputs = arguments[6]
        elif "val" in arguments[0].meta:
            inputs = int(arguments[0].meta["val"].shape[-1])
        codes = (unpack(packed, bits, inputs).to(torch.int16) - above).to(spec.dtype)
    if zero_point:
        return codes, zero_point[0].to(spec.zero_point_dtype) - above
    return codes, torch.full_like(scale, zero - above, dtype=torch.int32)
