"""Put quantize/dequantize pairs where the plan wants them, and integer weights in place of float
ones.

An activation is quantized once, where it is made; operators that only move data then move integers,
and each consumer dequantizes what it reads:

    source -> quantize -> reshape -> dequantize -> product

Its scale and zero point are buffers called after the first site that reads it: ``fc.input_scale``.
Dynamic ones are chosen from the tensor at each call, as the consumer reads it:

    source -> reshape -> choose_qparams, quantize -> dequantize -> product
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.core.plan import SitePlan
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.graph.lstm import LSTM, cells_of
from torch_quant.graph.ops import OPERATORS, OpPattern
from torch_quant.graph.qdq import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE
from torch_quant.graph.sites import (
    find_sites,
    is_constant,
    key_of,
    local_name,
    operands,
    results,
    source,
)
from torch_quant.passes.attention import decompose_attention
from torch_quant.passes.base import PassContext
from torch_quant.passes.constants import evaluate, expression, name_of, new_constant, new_constants

__all__ = ["insert_qdq"]

_ATTENTION, _LSTM = (OPERATORS[name] for name in ("scaled_dot_product_attention", "lstm"))
_CONSTANTS = ("placeholder", "get_attr")


@dataclass
class _Inserter:
    context: PassContext
    integers: dict[tuple[fx.Node, QuantSpec], fx.Node] = field(default_factory=dict)
    qparams: dict[tuple[str, QuantSpec], QParams] = field(default_factory=dict)
    grids: dict[tuple[str, QuantSpec], list[fx.Node]] = field(default_factory=dict)
    """Tensor and format -> the nodes of its scale and zero point, at the head of the graph."""
    met: dict[tuple[fx.Node, QuantSpec], tuple[fx.Node, list[fx.Node]]] = field(
        default_factory=dict
    )
    """Tensor and dynamic format -> its codes, scale and zero point."""
    weights: dict[tuple[str, QuantSpec, int], tuple[Tensor, QParams]] = field(default_factory=dict)
    """What computes a weight, its format and axis -> its codes; no float copy is kept."""

    def activations(self, user: fx.Node, args: list[fx.Node], entry: SitePlan) -> None:
        """Make ``user`` read ``args`` quantized; one tensor may stand in several places."""
        assert entry.activation is not None
        for i, arg in enumerate(args):
            if arg not in args[:i]:
                name = f"{local_name(user)}.input{f'_{i}' if i else ''}"
                self.activation(user, arg, key_of(source(arg)), entry.activation, name)

    def activation(self, user: fx.Node, arg: fx.Node, key: str, spec: QuantSpec, name: str) -> None:
        """Make ``user`` read ``arg`` quantized to ``spec``.

        Args:
            key: of the tensor.
            name: what its scale is called after unless it has one.
        """
        if spec.dynamic:
            codes, grid = self._met(arg, spec)
        else:
            codes = self._codes(arg, key, spec, name)
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
            origin = node.args[0]
            assert isinstance(origin, fx.Node)
            inner = self._codes(origin, key, spec, name)
            with graph.inserting_after(node):
                codes = graph.node_copy(node, lambda n: inner if n is origin else n)
        self.integers[node, spec] = codes
        return codes

    def result(self, node: fx.Node, entry: SitePlan) -> None:
        """Let all that reads the site's stored result read it quantized."""
        assert entry.activation is not None
        stored = node if key_of(node) == entry.stored else next(iter(node.users))
        name = f"{local_name(node)}.output"
        codes = self._codes(stored, entry.stored, entry.activation, name)
        with node.graph.inserting_after(codes):
            grid = self.grids[entry.stored, entry.activation]
            args: Any = (codes, *grid, entry.activation.element.name)
            real = node.graph.call_function(DEQUANTIZE, args)
        real.meta["val"] = stored.meta["val"]
        stored.replace_all_uses_with(real, delete_user_cb=lambda user: user is not codes)

    def weight(self, node: fx.Node, pattern: OpPattern, site: SitePlan) -> None:
        """Replace the weight argument by integer codes and their dequantization."""
        assert pattern.weight is not None
        assert site.weight is not None
        old = node.args[pattern.weight]
        assert isinstance(old, fx.Node)
        gm, axis = self.context.gm, pattern.weight_axis
        memo = (expression(gm, old), site.weight, axis)
        if memo not in self.weights:
            value = evaluate(gm, old).detach()
            codes, qparams = self.context.params.weight(site.name, value, site.weight, axis)
            self.weights[memo] = codes.contiguous(), qparams  # as kernels pack it
        local = local_name(node)
        real = self._codes_of(node, name_of(old, f"{local}.weight"), *self.weights[memo])
        node.update_arg(pattern.weight, real)
        place = pattern.bias
        bias = None if place is None or len(node.args) <= place else node.args[place]
        if isinstance(bias, fx.Node) and bias.op != "get_attr" and is_constant(bias):
            name = name_of(bias, f"{local}.bias")
            assert place is not None
            node.update_arg(place, new_constant(gm, name, evaluate(gm, bias), node))

    def _codes_of(self, node: fx.Node, name: str, codes: Tensor, qparams: QParams) -> fx.Node:
        """A dequantized weight, placed before ``node``."""
        values = {"": codes, "_scale": qparams.scale, "_zero_point": qparams.zero_point}
        constants = new_constants(self.context.gm, name, values, node)
        with node.graph.inserting_before(node):
            args: Any = (*constants, qparams.spec.element.name)
            return node.graph.call_function(DEQUANTIZE, args)

    def lstm(self, node: fx.Node, entry: SitePlan) -> None:
        """Quantize an LSTM: input, matrices, and the hidden state at every step.

        Kernels sum ``W_ih x + W_hh h`` as integers, so a row of both matrices shares one scale, in
        units of a step of ``x`` and of ``h``. Inner layers read ``h``. With float activations each
        matrix has scales of its own.
        """
        spec, hidden = entry.activation, entry.inputs[-1]
        x, hx, params, has_biases, layers, _, _, bidirectional, batch_first = node.args
        assert isinstance(x, fx.Node)
        scale_of_x = scale_of_h = torch.ones(())
        if spec is not None:
            scale_of_x = self._qparams(key_of(source(x)), spec).scale
            scale_of_h = self._qparams(hidden, spec).scale
        cells = cells_of(params, bool(has_biases))
        new: list[Any] = []
        for i, (w_ih, w_hh, *biases) in enumerate(cells):
            if entry.weight is None:
                new += [w_ih, w_hh, *biases]
                continue
            inner = i >= len(cells) // int(layers)  # type: ignore[arg-type]
            factor = torch.ones(()) if inner else scale_of_x / scale_of_h
            values = [evaluate(self.context.gm, each).detach() for each in (w_ih, w_hh)]
            if spec is None:
                parts = [
                    self.context.params.weight(entry.name, each, entry.weight, 0) for each in values
                ]
            else:
                joined = torch.cat([values[0] * factor, values[1]], 1)
                both, qparams = self.context.params.weight(entry.name, joined, entry.weight, 0)
                codes = both.split([each.shape[1] for each in values], 1)
                grids = [replace(qparams, scale=qparams.scale / factor), qparams]
                parts = list(zip(codes, grids, strict=True))
            made_up = (f"{local_name(node)}.weight_{role}_{i}" for role in ("ih", "hh"))
            names = [name_of(*each) for each in zip((w_ih, w_hh), made_up, strict=True)]
            for name, (part, grid) in zip(names, parts, strict=True):
                new.append(self._codes_of(node, name, part.contiguous(), grid))
            new += biases
        if spec is None:  # the float operator, on dequantized matrices
            node.update_arg(2, new)
            return
        self.activations(node, [x], entry)
        grid_of_h = self._grid(hidden, spec, f"{local_name(node)}.hidden")
        node.target = LSTM
        options = (has_biases, layers, bidirectional, batch_first)
        node.args = (node.args[0], hx, new, *options, *grid_of_h, spec.element.name)


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
    stored: list[tuple[fx.Node, SitePlan]] = []
    with torch.no_grad():
        for node, pattern, site in list(find_sites(context.graph)):
            entry = context.plan[site.name]
            if not entry.quantized:
                continue
            if pattern is _ATTENTION:
                _quantize_attention(inserter, node, entry)
            elif pattern is _LSTM:
                inserter.lstm(node, entry)
            else:
                if entry.activation is not None:
                    inserter.activations(node, operands(node, pattern), entry)
                if pattern.weight is not None and entry.weight is not None:
                    inserter.weight(node, pattern, entry)
                if entry.stored:
                    stored.append((results(node)[0], entry))
            changed += 1
    for node, entry in stored:  # last: until here, sites find the source of what they read
        inserter.result(node, entry)
    return changed


def _quantize_attention(inserter: _Inserter, node: fx.Node, entry: SitePlan) -> None:
    assert entry.activation is not None
    inserter.activations(node, operands(node, _ATTENTION), entry)
    probabilities, name = entry.inputs[-1], f"{local_name(node)}.probabilities"
    _, second = decompose_attention(node)
    left = second.args[0]
    assert isinstance(left, fx.Node)
    inserter.activation(second, left, probabilities, entry.activation, name)
