"""From a captured model and a plan to a twin that trains.

It is the lowering of REFERENCE with three differences: the float model's parameters are shared and
not copied, weights are rounded in the graph at each call, and what rounds has a gradient.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx, nn

from torch_quant.backends.base import Backend
from torch_quant.backends.reference import ReferenceBackend
from torch_quant.convert.lowering import Lowering
from torch_quant.convert.mounting import place_in_memory
from torch_quant.convert.ownership import Owner, SharedWeights
from torch_quant.convert.quantization import Quantization
from torch_quant.convert.quantized import QuantizedModule, quantized_module
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.core.functional import dequantize, quantize
from torch_quant.core.plan import QuantPlan
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.graph.capture import CapturedModule
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.kinds import Kind
from torch_quant.ops.qdq import CHOOSE_QPARAMS, DEQUANTIZE, FAKE_QUANTIZE, QUANTIZE
from torch_quant.passes.base import Params, PassContext
from torch_quant.passes.constants import constant_beside
from torch_quant.passes.fold_batch_norm import folded_norms
from torch_quant.qat.dropout import put_back_dropout
from torch_quant.qat.fake_quantize import TRAINED_FAKE_QUANTIZE, label
from torch_quant.qat.methods import INPUT, WEIGHT, QatMethod
from torch_quant.qat.model import QatModel, TrainedQuantization
from torch_quant.qat.modes import TrainedGraph, results_of
from torch_quant.qat.observing import range_of
from torch_quant.qat.tables import round_read_rows
from torch_quant.statistics import Statistic

__all__ = ["LearnedParams", "QatLowering", "TrainingBackend", "weight_offset"]

logger = logging.getLogger("torch_quant")

V = TypeVar("V")

_OFFSET = "offset"
"""Of weights, what is kept: what is added to them, so that nearest rounding gives the codes that
training begins with."""
_FACTS = "torch_quant_facts"
"""Entry of ``node.meta`` of a constant: the keys that its value is kept under."""


class _LearnedGrid(QParams):
    """Scales and zero points in training: where these are learned, they are float32."""

    def __post_init__(self) -> None:
        """Nothing is checked: it began as a grid that was."""


class LearnedParams:
    """Scales that begin as another source has them, and are parameters where the method says so.

    Args:
        start: where they begin.
        plan: what is done with each site.
        method: says which are learned.
        model: the float model, or a twin of it.
    """

    def __init__(self, start: Params, plan: QuantPlan, method: QatMethod, model: nn.Module) -> None:
        self._start, self._plan, self._method = start, plan, method
        self._weights = {x.untyped_storage()._cdata for x in model.parameters() if _plain(x)}
        self._made: dict[Hashable, QParams] = {}
        self._rounds: dict[int, tuple[dict[str, None], QuantSpec]] = {}
        self._ends: dict[int, Tensor] = {}
        self._rows: dict[Hashable, int] = {}
        self.facts: dict[Hashable, Any] = {}
        """What transforms have computed from the weights that training began with."""
        self.places: dict[tuple[Any, ...], nn.Parameter] = {}
        """Where each parameter that was made lies in memory."""

    def beside(self, start: Params, plan: QuantPlan) -> LearnedParams:
        """The same scales, for graphs of another plan; new ones begin as ``start`` has them."""
        new = copy.copy(self)  # what was made is shared
        new._start, new._plan = start, plan
        return new

    def activation(self, key: str, spec: QuantSpec) -> QParams:
        """Of the tensor ``key``; raises :class:`NotCalibrated`."""
        name = key, spec
        if name not in self._made:
            self._learn(name, key, INPUT, self._start.activation(key, spec))
        return self._made[name]

    def weight(
        self, site: str, weight: Tensor, spec: QuantSpec, axis: int
    ) -> tuple[Tensor, QParams]:
        """Of a site's weight, which is given back as it is. Sites with one weight share a scale."""
        spec = spec.on(axis)
        tied = weight.untyped_storage()._cdata in self._weights
        which = place_in_memory(weight) if tied else site.partition("@")[0]
        name = which, spec, self._plan[site].method
        if name not in self._made:
            codes, qparams = self._start.weight(site, weight, spec, axis)
            self._learn(name, site, WEIGHT, qparams)
            method = self._plan[site].method
            by_data = method is not None and (method.wants_statistics or method.wants_blocks)
            if by_data or not torch.equal(codes, quantize(weight, qparams)):
                self.facts[_OFFSET, site, spec] = dequantize(codes, qparams) - weight
        found = self._made[name]
        rows = self._rows.setdefault(name, weight.shape[axis])
        if rows != weight.shape[axis]:
            raise InvalidConfig(
                f"{site}: the layer would compute copies of channels for OutlierSplit in one kind "
                f"of calls and not in another ({rows} rows of its weight, and {weight.shape[axis]} "
                "here), and in training both have one scale: calibrate with both kinds of calls "
                "before quantizer.qat(model), or leave OutlierSplit out there"
            )
        if (offset := self.offset(found.scale)) is not None:
            self.facts[_OFFSET, site, spec] = offset
        self._rounds[id(found.scale)][0][site] = None
        return weight, found

    def _learn(self, name: Hashable, key: str, role: str, qparams: QParams) -> None:
        spec, scale, zero_point = qparams.spec, qparams.scale.clone(), qparams.zero_point.clone()
        if self._method.learns_scale(role, spec):
            scale = nn.Parameter(scale)
        if self._method.learns_zero_point(role, spec):
            zero_point = nn.Parameter(zero_point.to(torch.float32))
        for each in (scale, zero_point):
            if isinstance(each, nn.Parameter):
                self.places[place_in_memory(each)] = each
        self._made[name] = _LearnedGrid(spec, scale, zero_point)
        self._rounds[id(scale)] = {key: None}, spec
        if role == INPUT:
            self._ends[id(scale)] = range_of(qparams)

    def offset(self, scale: Any) -> Tensor | None:
        """What is added to the weight that a scale rounds; None for nothing."""
        sites, spec = self._rounds[id(scale)]
        return weight_offset(self.facts, sites, spec)

    def derived(self, key: str, spec: QuantSpec, found: QParams) -> QParams:
        """Of a tensor that a transform made: it begins as ``found``."""
        name = key, spec
        if name not in self._made:
            self._learn(name, key, INPUT, found)
        return self._made[name]

    def known(self, scale: Any) -> tuple[str, QuantSpec] | None:
        """What the scale in a graph is for, as a label, and its format; None if not from here."""
        found = self._rounds.get(id(scale))
        return None if found is None else (label(list(found[0]), found[1]), found[1])

    def ends(self, scale: Any) -> Tensor:
        """The range that an activation's scale begins with, to be moved: one tensor for each."""
        return self._ends[id(scale)]

    def statistic(self, key: str, what: str) -> Statistic:
        """What was recorded of the tensor ``key``; raises :class:`NotCalibrated`."""
        return self._start.statistic(key, what)

    def graphs(self) -> Iterable[fx.GraphModule]:
        """The canonical graphs of the whole model."""
        return self._start.graphs()

    def shared(self, key: Hashable, make: Callable[[], V]) -> V:
        """What ``make`` gave when ``key`` was first asked for."""
        return self._start.shared(key, make)

    def kept(self, key: Hashable, make: Callable[[], V]) -> V:
        """What ``make`` gave when ``key`` was first asked for, for good."""
        if key not in self.facts:
            self.facts[key] = make()
        found: V = self.facts[key]
        self._start.kept(key, lambda: found)  # which rounds the weights that training begins with
        return found

    def keys_of(self, value: Any) -> tuple[Hashable, ...]:
        """The keys that a tensor is kept under."""
        return tuple(key for key, fact in self.facts.items() if fact is value)


def weight_offset(
    facts: Mapping[Hashable, Any], sites: Iterable[str], spec: QuantSpec
) -> Tensor | None:
    """What is added to a weight before it is rounded; None for nothing.

    Args:
        facts: what is kept.
        sites: that read the weight.
        spec: the format.
    """
    known = (facts.get((_OFFSET, site, spec)) for site in sites)
    return next((each for each in known if each is not None), None)


class TrainingBackend(ReferenceBackend):
    """REFERENCE with gradients. It is none that users choose.

    Args:
        simulates: the backend that the trained model is for.
        method: gives the gradients.
    """

    name = "qat"

    def __init__(self, simulates: Backend, method: QatMethod) -> None:
        super().__init__(simulates)
        self.method = method

    def lower(self, context: PassContext) -> fx.GraphModule:
        params, graph = context.params, context.graph
        assert isinstance(params, LearnedParams)
        for node in list(graph.nodes):
            if node.target in (QUANTIZE, FAKE_QUANTIZE):
                role = INPUT if node.target is QUANTIZE else WEIGHT
                self._round(context.gm, node, role, params)
            elif node.target is DEQUANTIZE:
                node.replace_all_uses_with(node.args[0])  # float already
                graph.erase_node(node)
            elif node.target is CHOOSE_QPARAMS:  # no gradient passes the choice of a scale
                with graph.inserting_before(node):
                    constant = graph.call_function(torch.ops.aten.detach.default, (node.args[0],))
                node.update_arg(0, constant)
        for node in graph.find_nodes(op="get_attr"):
            if keys := params.keys_of(_value(node)):
                node.meta[_FACTS] = keys
        round_read_rows(graph, _with_scales_by_row(graph))
        return context.gm

    def _round(self, gm: fx.GraphModule, node: fx.Node, role: str, params: LearnedParams) -> None:
        x, scale, zero_point, element = node.args
        assert isinstance(scale, fx.Node)
        scale_type, text, ends, offset = "float32", "", None, None
        if scale.op == "get_attr":
            known = params.known(_value(scale))
            assert known is not None, f"{scale.target} was not made for training"
            text, spec = known
            scale_type = spec.scale_type.value
            if role == INPUT:
                value = params.ends(_value(scale))
                ends = constant_beside(gm, scale, "_range", value, node)
            elif (start := params.offset(_value(scale))) is not None:
                offset = constant_beside(gm, scale, "_offset", start, node)
        node.target = TRAINED_FAKE_QUANTIZE
        how = element, scale_type, role, self.method.name, text
        node.args = (x, scale, zero_point, *how, ends)
        node.kwargs = {} if offset is None else {"offset": offset}


def _with_scales_by_row(graph: fx.Graph) -> frozenset[fx.Node]:
    """Where parameters of two dimensions are rounded with one scale or more for each row."""
    found = []
    for node in graph.find_nodes(op="call_function", target=TRAINED_FAKE_QUANTIZE):
        table, scale = node.args[:2]
        if node.kwargs:
            continue
        if table.op == scale.op == "get_attr":
            x, step = _value(table), _value(scale)
            if x.dim() == step.dim() == 2 and x.shape[0] == step.shape[0]:
                found.append(node)
    return frozenset(found)


def _value(node: fx.Node) -> Any:
    path, _, name = str(node.target).rpartition(".")
    owner = node.graph.owning_module.get_submodule(path)  # type: ignore[union-attr]
    return getattr(owner, name)


class _Sharing(Owner):
    """Puts the float model's own parameters, and the scales that are learned, back into a twin.

    Args:
        model: the float model, or a twin of it.
        params: has the scales.
    """

    def __init__(self, model: nn.Module, params: LearnedParams) -> None:
        super().__init__({}, None)
        self.params = params
        self.theirs = {place_in_memory(x): x for x in model.parameters() if _plain(x)}

    def tensor(self, x: Tensor) -> Tensor:
        if not _plain(x):
            return x
        place = place_in_memory(x)
        return self.params.places.get(place, self.theirs.get(place, x))

    def take(self, modules: Iterable[nn.Module]) -> None:
        """Have ``modules`` hold the parameters in the place of what shares memory with them."""
        for module in list(modules):
            if not isinstance(module, torch.jit.ScriptModule):
                for name, value in module._buffers.items():
                    if value is not None:
                        module._buffers[name] = self.tensor(value)

    def attributes(self, values: dict[str, Any]) -> None:
        """Nothing: what is the float model's stays so."""


def _plain(x: Tensor) -> bool:
    return x.layout == torch.strided


@dataclass(frozen=True)
class QatLowering(Lowering):
    """One ``qat``; ``backend`` is a :class:`TrainingBackend`, ``params`` are learned."""

    live: ClassVar[bool] = True

    def module(self, twin: nn.Module, how: Quantization) -> QuantizedModule:
        assert isinstance(self.backend, TrainingBackend)
        facts = vars(how) | {"method": self.backend.method.name}
        return quantized_module(twin, TrainedQuantization(**facts), QatModel)

    def _graph(self, submodule: CapturedModule, kind: Kind, graph: CapturedGraph) -> QuantizedGraph:
        made = TrainedGraph.over(super()._graph(submodule, kind, graph))
        made.folded = tuple(folded_norms(made.body.graph))
        made.path = submodule.path
        constants = made.body.graph.find_nodes(op="get_attr")
        kept = ((node.name, node.meta.pop(_FACTS, ())) for node in constants)
        made.facts = {name: keys for name, keys in kept if keys}
        made.results = results_of(made.body.graph, submodule.path, made.folded)
        left_out = put_back_dropout(made.body, self.captured.prepared(submodule, graph).captured)
        if left_out:
            logger.warning(
                "dropout stays off while training in %s: what it drops was folded into other "
                "operators, or is read by others too",
                ", ".join(dict.fromkeys(left_out)),
            )
        return made

    def _owner(self, shared: SharedWeights | None) -> Owner:
        assert isinstance(self.params, LearnedParams)
        return _Sharing(self.captured.root.module, self.params)
