"""Put quantize/dequantize pairs where the plan wants them, and integer weights in place of float
ones.

An activation is quantized once, where it is made; operators that only move data then move integers,
and each consumer dequantizes what it reads:

    source -> quantize -> reshape -> dequantize -> product
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.core.granularity import PerChannel
from torch_quant.core.plan import SitePlan
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.graph.lstm import LSTM, cells_of
from torch_quant.graph.ops import OPERATORS, OpPattern
from torch_quant.graph.qdq import (
    DEQUANTIZE,
    DEQUANTIZE_BLOCKS,
    DEQUANTIZE_CHANNEL,
    QUANTIZE,
    QUANTIZE_BLOCKS,
)
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


@dataclass(frozen=True)
class _Weight:
    """Codes of a weight and what they stand for, in the shapes that the graph has them in.

    Args:
        axis: for integers per channel of this axis: scales have one dimension then.
    """

    codes: Tensor
    spec: QuantSpec
    scale: Tensor
    zero_point: Tensor
    axis: int | None

    @classmethod
    def of(cls, codes: Tensor, qparams: QParams, axis: int) -> _Weight:
        """Those of a weight with its output channels on ``axis``."""
        spec, scale, zero_point = qparams.spec, qparams.scale, qparams.zero_point
        if spec.integer and PerChannel(axis).serves(spec.granularity):
            return cls(codes, spec, scale.flatten(), zero_point.flatten(), axis)
        return cls(codes, spec, scale, zero_point, None)


@dataclass
class _Inserter:
    context: PassContext
    integers: dict[tuple[fx.Node, QuantSpec], fx.Node] = field(default_factory=dict)
    grids: dict[tuple[str, QuantSpec], QParams] = field(default_factory=dict)
    weights: dict[tuple[str, QuantSpec, int], _Weight] = field(default_factory=dict)
    """What computes a weight, its format and axis -> its codes; no float copy is kept."""

    def activations(self, user: fx.Node, args: list[fx.Node], entry: SitePlan) -> None:
        """Make ``user`` read ``args`` quantized; one tensor may stand in several places."""
        assert entry.activation is not None
        for arg in dict.fromkeys(args):
            self.activation(user, arg, key_of(source(arg)), entry.activation)

    def activation(self, user: fx.Node, arg: fx.Node, key: str, spec: QuantSpec) -> None:
        """Make ``user`` read ``arg`` quantized to ``spec``."""
        codes = self._codes(arg, key, spec)
        with user.graph.inserting_before(user):
            real = self._real(codes, key, spec)
        real.meta["val"] = arg.meta["val"]
        user.replace_input_with(arg, real)

    def _real(self, codes: fx.Node, key: str, spec: QuantSpec) -> fx.Node:
        """The tensor ``key`` from its codes, placed where the graph inserts."""
        if spec.integer:
            return codes.graph.call_function(DEQUANTIZE, (codes, *self._scalars(key, spec)))
        quantizer: Any = codes
        while quantizer.target is not QUANTIZE_BLOCKS:
            quantizer = quantizer.args[0]
        return codes.graph.call_function(DEQUANTIZE_BLOCKS, (codes, *quantizer.args[1:]))

    def _qparams(self, key: str, spec: QuantSpec) -> QParams:
        if (key, spec) not in self.grids:
            self.grids[key, spec] = self.context.qparams(key, spec)
        return self.grids[key, spec]

    def _scalars(self, key: str, spec: QuantSpec) -> tuple[float, int]:
        qparams = self._qparams(key, spec)
        return float(qparams.scale), int(qparams.zero_point)

    def _codes(self, node: fx.Node, key: str, spec: QuantSpec) -> fx.Node:
        if (node, spec) in self.integers:
            return self.integers[node, spec]
        graph = node.graph
        if source(node) is node:
            qparams = self._qparams(key, spec)
            anchor = node.next
            while anchor.op == "placeholder":
                anchor = anchor.next
            target: Any = QUANTIZE
            limits = (spec.quant_min, spec.quant_max, spec.dtype)
            args: tuple[Any, ...] = (node, *self._scalars(key, spec), *limits)
            if not spec.integer:
                name = re.sub(r"\W", "_", key).strip("_")
                tensors = {"_scale": qparams.scale, "_zero_point": qparams.zero_point}
                grid = new_constants(self.context.gm, name, tensors, anchor)
                target, args = QUANTIZE_BLOCKS, (node, *grid, spec.element.name)
            with graph.inserting_before(anchor):
                codes = graph.call_function(target, args)
        else:
            origin = node.args[0]
            assert isinstance(origin, fx.Node)
            inner = self._codes(origin, key, spec)
            with graph.inserting_after(node):
                codes = graph.node_copy(node, lambda n: inner if n is origin else n)
        self.integers[node, spec] = codes
        return codes

    def result(self, node: fx.Node, entry: SitePlan) -> None:
        """Let all that reads the site's stored result read it quantized."""
        assert entry.activation is not None
        stored = node if key_of(node) == entry.stored else next(iter(node.users))
        codes = self._codes(stored, entry.stored, entry.activation)
        with node.graph.inserting_after(codes):
            real = self._real(codes, entry.stored, entry.activation)
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
            self.weights[memo] = _Weight.of(codes.contiguous(), qparams, axis)  # as kernels pack it
        local = local_name(node)
        real = self._codes_of(node, name_of(old, f"{local}.weight"), self.weights[memo])
        node.update_arg(pattern.weight, real)
        place = pattern.bias
        bias = None if place is None or len(node.args) <= place else node.args[place]
        if isinstance(bias, fx.Node) and bias.op != "get_attr" and is_constant(bias):
            name = name_of(bias, f"{local}.bias")
            assert place is not None
            node.update_arg(place, new_constant(gm, name, evaluate(gm, bias), node))

    def _codes_of(self, node: fx.Node, name: str, weight: _Weight) -> fx.Node:
        """A dequantized weight, placed before ``node``."""
        gm, spec = self.context.gm, weight.spec
        values = {"": weight.codes, "_scale": weight.scale, "_zero_point": weight.zero_point}
        target: Any = DEQUANTIZE
        args: tuple[Any, ...]
        if spec.integer and spec.per_tensor:
            codes = new_constant(gm, name, weight.codes, node)
            args = (codes, float(weight.scale), int(weight.zero_point))
        elif weight.axis is not None:
            target = DEQUANTIZE_CHANNEL
            args = (*new_constants(gm, name, values, node), weight.axis)
        else:
            target = DEQUANTIZE_BLOCKS
            args = (*new_constants(gm, name, values, node), spec.element.name)
        with node.graph.inserting_before(node):
            return node.graph.call_function(target, args)

    def lstm(self, node: fx.Node, entry: SitePlan) -> None:
        """Quantize an LSTM: input, matrices, and the hidden state at every step.

        Kernels sum ``W_ih x + W_hh h`` as integers, so a row of both matrices shares one scale, in
        units of a step of ``x`` and of ``h``. Inner layers read ``h``.
        """
        assert entry.activation is not None
        x, hx, params, has_biases, layers, _, _, bidirectional, batch_first = node.args
        assert isinstance(x, fx.Node)
        of_x = self.context.qparams(key_of(source(x)), entry.activation)
        of_h = self.context.qparams(entry.inputs[-1], entry.activation)
        outer = float(of_x.scale) / float(of_h.scale)
        cells = cells_of(params, bool(has_biases))
        new: list[Any] = []
        for i, (w_ih, w_hh, *biases) in enumerate(cells):
            if entry.weight is None:  # what activations alone do is asked for
                new += [w_ih, w_hh, *biases]
                continue
            factor = outer if i < len(cells) // int(layers) else 1.0  # type: ignore[arg-type]
            values = [evaluate(self.context.gm, each).detach() for each in (w_ih, w_hh)]
            joined = torch.cat([values[0] * factor, values[1]], 1)
            both, qparams = self.context.params.weight(entry.name, joined, entry.weight, 0)
            codes = both.split([each.shape[1] for each in values], 1)
            made_up = (f"{local_name(node)}.weight_{role}_{i}" for role in ("ih", "hh"))
            names = [name_of(*each) for each in zip((w_ih, w_hh), made_up, strict=True)]
            grids = [replace(qparams, scale=qparams.scale / factor), qparams]
            for name, part, grid in zip(names, codes, grids, strict=True):
                weight = _Weight.of(part.contiguous(), grid, 0)
                new.append(self._codes_of(node, name, weight))
            new += biases
        self.activations(node, [x], entry)
        spec = entry.activation
        limits = (float(of_h.scale), int(of_h.zero_point), spec.quant_min, spec.quant_max)
        node.target = LSTM
        options = (has_biases, layers, bidirectional, batch_first)
        node.args = (node.args[0], hx, new, *options, *limits)


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
    probabilities = entry.inputs[-1]
    _, second = decompose_attention(node)
    left = second.args[0]
    assert isinstance(left, fx.Node)
    inserter.activation(second, left, probabilities, entry.activation)
