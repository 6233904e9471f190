"""Put quantize/dequantize pairs where the plan wants them, and integer weights in place of float
ones.

An activation is quantized once, where it is made; operators that only move data then move integers,
and each consumer dequantizes what it reads:

    source -> quantize -> reshape -> dequantize -> product

Its scale and zero point are buffers called after the first site that reads it: ``fc.input_scale``.
Dynamic ones are chosen from the tensor at each call, as the consumer reads it:

    source -> reshape -> choose_qparams, quantize -> dequantize -> product

Of what a product sums over the columns of, "per token" is one scale for each column:

    source -> transpose -> choose_qparams, quantize -> dequantize -> transpose -> product

Where weights are ``live``, they are rounded in the graph: parameters -> fake_quantize -> product.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.core.plan import SitePlan
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.graph.sites import (
    find_sites,
    is_constant,
    key_of,
    local_name,
    operands,
    results,
    source,
)
from torch_quant.ops.arguments import argument, set_arguments
from torch_quant.ops.qdq import CHOOSE_QPARAMS, DEQUANTIZE, FAKE_QUANTIZE, QUANTIZE
from torch_quant.ops.table import OpPattern, pattern_of, size_hints
from torch_quant.passes.base import PassContext
from torch_quant.passes.constants import evaluate, name_of, new_constant, new_constants
from torch_quant.passes.rounded import rounded_weight

__all__ = ["insert_qdq"]

aten = torch.ops.aten

_CONSTANTS = ("placeholder", "get_attr")


@dataclass
class _Inserter:
    """Puts pairs into one graph; rows of the op table with a way of their own use it."""

    context: PassContext
    integers: dict[tuple[fx.Node, QuantSpec], fx.Node] = field(default_factory=dict)
    qparams: dict[tuple[str, QuantSpec], QParams] = field(default_factory=dict)
    grids: dict[tuple[str, QuantSpec], list[fx.Node]] = field(default_factory=dict)
    """Tensor and format -> the nodes of its scale and zero point, at the head of the graph."""
    met: dict[tuple[fx.Node, QuantSpec], tuple[fx.Node, list[fx.Node]]] = field(
        default_factory=dict
    )
    """Tensor and dynamic format -> its codes, scale and zero point."""
    turned: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Matrices -> their transposes."""

    def activations(self, user: fx.Node, args: list[fx.Node], entry: SitePlan) -> None:
        """Make ``user`` read ``args`` quantized; one tensor may stand in several places."""
        spec = entry.activation
        assert spec is not None
        for place in _by_columns(user, spec):  # first: one tensor may be read both ways
            set_arguments(user, {place: self._columns(user, argument(user, place), spec)})
        for i, arg in enumerate(args):
            if arg not in args[:i] and arg in user.all_input_nodes:
                role = f"input_{i}" if i else "input"
                self.activation(user, arg, self.source(arg), spec, role)

    def _columns(self, user: fx.Node, x: fx.Node, spec: QuantSpec) -> fx.Node:
        """The matrices ``x`` with a dynamic scale for each column, for ``user``."""
        if x not in self.turned:
            with x.graph.inserting_before(_behind_constants(x.next)):
                self.turned[x] = x.graph.call_function(aten.transpose.int, (x, -2, -1))
            self.turned[x].meta["val"] = x.meta["val"]  # a float tensor, which is all that is asked
        codes, grid = self._met(self.turned[x], spec)
        with x.graph.inserting_before(user):
            args: Any = (codes, *grid, spec.element.name)
            real = x.graph.call_function(DEQUANTIZE, args)
            back = x.graph.call_function(aten.transpose.int, (real, -2, -1))
        for each in (real, back):
            each.meta["val"] = x.meta["val"]
        return back

    def activation(self, user: fx.Node, arg: fx.Node, key: str, spec: QuantSpec, role: str) -> None:
        """Make ``user`` read ``arg`` quantized to ``spec``.

        Args:
            key: of the tensor.
            role: what its scale is called, behind the site's name, unless it has one.
        """
        if spec.dynamic:
            codes, grid = self._met(arg, spec)
        else:
            codes = self._codes(arg, key, spec, f"{local_name(user)}.{role}")
            grid = self.grids[key, spec]
        with user.graph.inserting_before(user):
            args: Any = (codes, *grid, spec.element.name)
            real = user.graph.call_function(DEQUANTIZE, args)
        real.meta["val"] = arg.meta["val"]
        user.replace_input_with(arg, real)

    def _met(self, x: fx.Node, spec: QuantSpec) -> tuple[fx.Node, list[fx.Node]]:
        """The codes of ``x`` on a grid that is chosen at each call, and that grid."""
        if (x, spec) not in self.met:
            how = (spec.symmetric, str(spec.granularity), spec.scale_type.value)
            with x.graph.inserting_before(_behind_constants(x.next)):
                both = x.graph.call_function(CHOOSE_QPARAMS, (x, spec.element.name, *how))
                grid = [x.graph.call_function(operator.getitem, (both, i)) for i in (0, 1)]
                args: Any = (x, *grid, spec.element.name)
                self.met[x, spec] = x.graph.call_function(QUANTIZE, args), grid
        return self.met[x, spec]

    def _qparams(self, key: str, spec: QuantSpec) -> QParams:
        if (key, spec) not in self.qparams:
            self.qparams[key, spec] = self.context.qparams(key, spec)
        return self.qparams[key, spec]

    def decline(self, node: fx.Node, why: str) -> None:
        self.context.decline(key_of(node), why)

    def scale(self, key: str, spec: QuantSpec) -> Tensor:
        return self._qparams(key, spec).scale

    def source(self, arg: fx.Node) -> str:
        return key_of(source(arg))

    def value(self, constant: fx.Node) -> Tensor:
        return evaluate(self.context.gm, constant).detach()

    def rounded(self, entry: SitePlan, weight: Tensor) -> tuple[Tensor, QParams]:
        assert entry.weight is not None
        return self.context.params.weight(entry.name, weight, entry.weight, 0)

    def grid(self, user: fx.Node, key: str, spec: QuantSpec, role: str) -> list[fx.Node]:
        return self._grid(key, spec, f"{local_name(user)}.{role}")

    def _grid(self, key: str, spec: QuantSpec, name: str) -> list[fx.Node]:
        """Scale and zero point of a tensor, in front of all that computes."""
        if (key, spec) not in self.grids:
            qparams = self._qparams(key, spec)
            values = {"_scale": qparams.scale, "_zero_point": qparams.zero_point}
            if self.grids:
                before = next(reversed(self.grids.values()))[-1].next
            else:
                before = _behind_constants(next(iter(self.context.graph.nodes)))
            self.grids[key, spec] = new_constants(self.context.gm, name, values, before)
        return self.grids[key, spec]

    def _codes(self, node: fx.Node, key: str, spec: QuantSpec, name: str) -> fx.Node:
        if (node, spec) in self.integers:
            return self.integers[node, spec]
        graph = node.graph
        if source(node) is node:
            args: Any = (node, *self._grid(key, spec, name), spec.element.name)
            with graph.inserting_before(_behind_constants(node.next)):
                codes = graph.call_function(QUANTIZE, args)
        else:
            origin = argument(node, 0)
            inner = self._codes(origin, key, spec, name)
            with graph.inserting_after(node):
                codes = graph.node_copy(node, lambda n: inner if n is origin else n)
        self.integers[node, spec] = codes
        return codes

    def result(self, node: fx.Node, entry: SitePlan) -> None:
        """Let all that reads the site's result read it quantized."""
        assert entry.activation is not None
        key = entry.quantized_output
        result = node if key_of(node) == key else next(iter(node.users))
        name = f"{local_name(node)}.output"
        codes = self._codes(result, key, entry.activation, name)
        with node.graph.inserting_after(codes):
            grid = self.grids[key, entry.activation]
            args: Any = (codes, *grid, entry.activation.element.name)
            real = node.graph.call_function(DEQUANTIZE, args)
        real.meta["val"] = result.meta["val"]
        result.replace_all_uses_with(real, delete_user_cb=lambda user: user is not codes)

    def only_weight(self, node: fx.Node, pattern: OpPattern, site: SitePlan) -> None:
        """Replace the weight argument by integer codes and their dequantization.

        A weight that is ``live`` is rounded in the graph, and its bias stays an expression.
        """
        assert pattern.weight is not None
        gm, old = self.context.gm, argument(node, pattern.weight)
        rounded = rounded_weight(self.context, node, pattern, site)
        new = self.weight(node, old, "weight", *rounded)
        set_arguments(node, {pattern.weight: new})
        if self.context.live or pattern.bias is None:
            return
        bias = argument(node, pattern.bias)
        if isinstance(bias, fx.Node) and bias.op != "get_attr" and is_constant(bias):
            name = name_of(bias, f"{local_name(node)}.bias")
            known = new_constant(gm, name, evaluate(gm, bias), node)
            set_arguments(node, {pattern.bias: known})

    def weight(
        self, user: fx.Node, old: fx.Node, role: str, codes: Tensor, qparams: QParams
    ) -> fx.Node:
        name = name_of(old, f"{local_name(user)}.{role}")
        grid = {"_scale": qparams.scale, "_zero_point": qparams.zero_point}
        live, element = self.context.live, qparams.spec.element.name
        values = grid if live else {"": codes, **grid}
        constants = new_constants(self.context.gm, name, values, user)
        with user.graph.inserting_before(user):
            if live:
                return user.graph.call_function(FAKE_QUANTIZE, (old, *constants, element))
            return user.graph.call_function(DEQUANTIZE, (*constants, element))


def _by_columns(node: fx.Node, spec: QuantSpec) -> list[int]:
    """The positions of what a product sums over the columns of, where scales are of vectors."""
    pattern = pattern_of(node)
    if pattern is None or not pattern.columns or not spec.dynamic or spec.per_tensor:
        return []
    return [each for each in pattern.columns if len(size_hints(argument(node, each))) > 1]


def _behind_constants(node: fx.Node) -> fx.Node:
    """``node``, or the first after it that computes something."""
    while node.op in _CONSTANTS:
        node = node.next
    return node


def insert_qdq(context: PassContext) -> int:
    """Quantize every site that the plan quantizes; returns how many.

    Raises:
        NotCalibrated: a range is missing; from ``context.params``.
        QuantError: a weight is not finite; from ``context.params``.
    """
    inserter = _Inserter(context)
    changed = 0
    outputs: list[tuple[fx.Node, SitePlan]] = []
    with torch.no_grad():
        for node, pattern, site in list(find_sites(context.graph)):
            entry = context.plan[site.name]
            if not entry.quantized:
                continue
            changed += 1
            if pattern.quantize is not None:
                pattern.quantize(inserter, node, entry)
                continue
            if entry.activation is not None:
                inserter.activations(node, operands(node, pattern), entry)
            if pattern.weight is not None and entry.weight is not None:
                inserter.only_weight(node, pattern, entry)
            if entry.quantized_output:
                outputs.append((results(node)[0], entry))
    for node, entry in outputs:  # last: until here, sites find the source of what they read
        inserter.result(node, entry)
    return changed
