"""A float model as the package knows it: what was captured of it."""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import fx, nn

from torch_quant.core.plan import FloatOp, QuantPlan
from torch_quant.errors import NotCalibrated
from torch_quant.graph.capture import CapturedModule
from torch_quant.graph.dynamic import check_arguments
from torch_quant.graph.executor import owner_of
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.facts import attributes
from torch_quant.graph.glance import Glance
from torch_quant.graph.identity import fingerprint
from torch_quant.graph.macs import GLUE
from torch_quant.graph.policy import CapturePolicy
from torch_quant.graph.sites import Site, find_sites, source, weights
from torch_quant.graph.twin import twin_of
from torch_quant.passes.functionalize import writes_attributes
from torch_quant.passes.prepare import Prepared, prepare

__all__ = [
    "CapturedModel",
    "rebind",
]

logger = logging.getLogger("torch_quant")


class CapturedModel:
    """Captured modules and prepared graphs of one model; grows as calls come in.

    Args:
        model: the float model.
        dynamic: the free dimensions of those of its inputs of which not all may be.
        policy: which of its parts are graphs.

    Raises:
        InvalidConfig: ``dynamic`` names what is no input, ``policy`` what is no module.
    """

    def __init__(
        self,
        model: nn.Module,
        dynamic: Mapping[str, frozenset[int]] = MappingProxyType({}),
        policy: CapturePolicy = CapturePolicy(),  # noqa: B008 - frozen
    ) -> None:
        policy.check(model)
        self.fingerprint = fingerprint(model)
        self.attributes = attributes(model)
        self.altered: tuple[str, ...] = ()
        """Attributes of the model that are others than when it was first captured."""
        self.parameters = _identities(model)
        self._glance: Glance | None = None
        self._weights: tuple[nn.Module, list[nn.Parameter]] | None = None
        self.root = CapturedModule(twin_of(model), dynamic=dynamic, policy=policy)
        check_arguments(dynamic, self.root.signature)
        self.version = 0
        self.declined: dict[str, dict[str, str]] = {}
        """Backend -> site -> why its graphs have it in float although the plan has not."""
        self.settled: dict[Any, Any] = {}
        """Optional transform and the sites that ask for it -> where it helps."""
        self.settled_on: Any = None
        """The ranges and weights that this rests on."""
        self.sample: Any = None
        """The last calibration batch of the whole model, where it is small."""
        self._told: tuple[str, ...] = ()
        self._prepared: dict[int, tuple[CapturedGraph, Prepared]] = {}
        training = [name or "the model" for name, m in model.named_modules() if m.training]
        if training:
            logger.warning(
                "%s is in train mode; it is captured, and its proxies compute, as in eval mode",
                training[0],
            )

    def copied(self) -> CapturedModel:
        """The same graphs, to be added to without a trace on these."""
        twin = copy.copy(self)
        twin.root, twin.sample = self.root.copied(), None
        twin._prepared, twin.settled = dict(self._prepared), dict(self.settled)
        return twin

    def refresh(self, model: nn.Module) -> None:
        """Notice what has changed in ``model`` since it was captured.

        Where Parameter and buffer objects were replaced (``load_state_dict(assign=True)`` does so),
        the graphs read the new ones. Where another attribute was, they are captured again.
        """
        if self._glance is not None and self._glance.agrees(model):
            return
        glance = Glance(model)
        self._compare_attributes(model)
        if self.parameters != _identities(model):
            self._read_anew(model)
        self._glance = glance  # last: what raised before is tried again

    def _read_anew(self, model: nn.Module) -> None:
        """Have the graphs read the parameters and buffers that there are now."""
        self.version += 1
        twin = twin_of(model)
        for submodule in self.root.walk():
            submodule.module = twin.get_submodule(submodule.path)
            for _, graph in submodule.graphs:
                prepared = self._prepared.get(id(graph))
                graphs = [graph.gm] if prepared is None else [graph.gm, prepared[1].canonical]
                for gm in graphs:
                    rebind(gm, submodule.module)
        self.parameters = _identities(model)

    @property
    def weights(self) -> list[nn.Parameter]:
        """The parameters that its graphs read and code between them, as they are now."""
        module = self.root.module
        if self._weights is None or self._weights[0] is not module:
            self._weights = module, list(module.parameters())
        return self._weights[1]

    def _compare_attributes(self, model: nn.Module) -> None:
        now = attributes(model)
        if now == self.attributes:
            return
        names = [
            name
            for name in now.keys() | self.attributes.keys()
            if now.get(name) != self.attributes.get(name)
        ]
        self.attributes = now
        written = {
            f"{submodule.path}.{name}".strip(".")
            for submodule in self.root.walk()
            for name in submodule.written
        }
        other = [n for n in names if not any(w == n or w.startswith(f"{n}.") for w in written)]
        if not other:  # a call of the float model has moved its own state on
            twin = twin_of(model)
            for submodule in self.root.walk():
                for path in submodule.state:
                    new, name = owner_of(twin.get_submodule(submodule.path), path)
                    if name in vars(new) and name not in ("_modules", "_parameters", "_buffers"):
                        vars(owner_of(submodule.module, path)[0])[name] = vars(new)[name]
            return
        if self.root.called:
            self.altered = tuple(sorted(other))
            logger.info("%s changed since the model was captured", ", ".join(self.altered))
        known = self.root
        self.root = CapturedModule(twin_of(model), dynamic=known.dynamic, policy=known.policy)
        self._prepared.clear()
        self.sample = None
        self.version += 1

    def as_lowered(self, plan: QuantPlan, backend: str) -> QuantPlan:
        """``plan`` as it turned out when the graphs were last lowered for ``backend``."""
        return plan.declined(self.declined.get(backend, {}))

    @property
    def keeps_state(self) -> bool:
        """Whether a call changes what later calls give: a quantized model begins before any."""
        return any(
            submodule.state
            or any(writes_attributes(graph.gm.graph) for _, graph in submodule.graphs)
            for submodule in self.root.walk()
        )

    def nothing_captured(self) -> str:
        """Why there is no site at all."""
        failed = [
            submodule
            for submodule in self.root.walk()
            if submodule.failure and not submodule.graphs
        ]
        if failed and not any(True for _ in self.graphs()):
            where = failed[-1].path or "the model"
            return f"{where} runs as Python: {failed[-1].failure}"
        return "it has no product of float tensors"

    def check_called(self, method: str, no_data: bool) -> None:
        """Raise :class:`NotCalibrated` if no call has captured it, for ``quantizer.<method>``."""
        if self.root.called:
            return
        site = "site, " if method == "explain" else ""
        call = f"{method}({site}model, example_inputs=...)"
        if method == "report":
            call = "report(path, model, batches=[...])"
        if self.altered:
            raise NotCalibrated(
                f"{', '.join(self.altered)} of the model changed since it was calibrated: run data "
                "through the proxy of quantizer.calib(model) again, or give "
                f"quantizer.{call} to keep the ranges"
            )
        raise NotCalibrated(
            "no calibration data was seen: run it through what quantizer.calib(model) returns"
            if no_data and method in ("quantize", "qat", "report")
            else "this model object is not captured yet (it was not calibrated, its ranges were "
            f"loaded, or it is a copy): quantizer.{call}"
        )

    @contextlib.contextmanager
    def calibrated_only(self) -> Iterator[None]:
        """Drop what is captured inside if it turns out to need ranges that there are not."""
        before = {id(submodule): len(submodule.graphs) for submodule in self.root.walk()}
        try:
            yield
        except NotCalibrated:
            for submodule in self.root.walk():
                del submodule.graphs[before.get(id(submodule), 0) :]
            raise

    def prepared(self, submodule: CapturedModule, graph: CapturedGraph) -> Prepared:
        """The prepared form of a captured graph, made once."""
        if id(graph) not in self._prepared:
            self._prepared[id(graph)] = (graph, prepare(graph.gm, submodule.path))
        return self._prepared[id(graph)][1]

    def graphs(self) -> Iterator[Prepared]:
        """Every prepared graph, those of outer modules first."""
        for submodule in self.root.walk():
            for _, graph in submodule.graphs:
                yield self.prepared(submodule, graph)

    @property
    def graph_count(self) -> int:
        """How many graphs there are; they grow in number and do not change."""
        return sum(len(submodule.graphs) for submodule in self.root.walk())

    @property
    def unreached(self) -> tuple[str, ...]:
        """Modules with parameters that no call has reached, in a model captured in pieces."""
        read = self._read()
        return tuple(
            submodule.path
            for submodule in self.root.walk()
            if not (submodule.called or submodule.borrowed or submodule.readers)
            and _is_foreign(submodule.module, read)
        )

    def unread(self) -> list[str]:
        """Modules that stand in a graph's module, of whose parameters no graph at all reads any.

        Those are others than :attr:`unreached`, which run by themselves.
        """
        read = self._read()
        pieces = {each.path for each in self.root.walk() if not each.graphs}
        found: list[str] = []
        for submodule in self.root.walk():
            for name, module in submodule.module.named_modules() if submodule.graphs else ():
                where = f"{submodule.path}.{name}".strip(".")
                inside = any(where.startswith(f"{outer}.") for outer in found)
                if name and where not in pieces and not inside and _is_foreign(module, read):
                    found.append(where)
        return found

    def _read(self) -> set[int]:
        """Identities of the parameters that graphs read."""
        graphs = (graph for each in self.root.walk() for _, graph in each.graphs)
        return {id(x) for graph in graphs for x in tensors_of(graph.gm)}

    def tell_unreached(self) -> None:
        """Log a warning of them, once."""
        unreached = self.unreached
        if unreached and unreached != self._told:
            logger.warning(
                "no call has reached %s since the model was captured, so it stays in float: run "
                "inputs that take it through the proxy of quantizer.calib(model), or give such "
                "example_inputs",
                ", ".join(unreached),
            )
        self._told = unreached

    def float_ops(self) -> list[FloatOp]:
        """What multiplies and is no site, once: in graphs, and in Python code by operator."""
        found: dict[str, FloatOp] = {}
        for submodule in self.root.walk():
            for _, graph in submodule.graphs:
                for op in self.prepared(submodule, graph).float_ops:
                    found.setdefault(op.name, op)
            for name, macs in submodule.glue_macs.items():
                if not name:  # says only that it was counted
                    continue
                where = f"{submodule.path}.{name}".strip(".")
                found.setdefault(where, FloatOp(where, name, macs, GLUE))
        return list(found.values())

    def plain_weights(self) -> set[str]:
        """The sites whose weight is a parameter as it is, transposed or not."""
        found = set()
        own = {id(x) for x in self.root.module.parameters()}
        for prepared in self.graphs():
            gm = prepared.canonical
            for node, pattern, site in find_sites(gm.graph):
                if site.op == "linear":
                    origin = source(weights(node, pattern)[0])
                    held = origin.op == "get_attr"
                    if held and id(operator.attrgetter(str(origin.target))(gm)) in own:
                        found.add(site.name)
        return found

    def sites(self) -> list[tuple[Site, str]]:
        """Every site once, with the reason why its graph does not allow int8, or an empty one."""
        found: dict[str, tuple[Site, str]] = {}
        for submodule in self.root.walk():
            for _, graph in submodule.graphs:
                prepared = self.prepared(submodule, graph)
                for site, obstacle in prepared.sites:
                    if submodule.picks and site.name in prepared.last:
                        site = replace(site, picks=True)
                    known = found.setdefault(site.name, (site, obstacle))
                    if obstacle and not known[1]:
                        found[site.name] = (site, obstacle)
        return list(found.values())


def rebind(gm: fx.GraphModule, module: nn.Module) -> None:
    """Have a graph read the tensors of ``module``, which is like the one it was captured of."""
    for node in gm.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        try:
            value = operator.attrgetter(str(node.target))(module)
        except AttributeError:
            continue  # a constant of the code, no attribute of the model
        setattr(gm.get_submodule(path), name, value)


def tensors_of(gm: fx.GraphModule) -> Iterator[object]:
    """What a graph reads of the model, the graphs inside of it too."""
    for node in gm.graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(str(node.target))(gm)
        if isinstance(value, fx.GraphModule):
            yield from tensors_of(value)
        yield value


def _is_foreign(module: nn.Module, read: set[int]) -> bool:
    """Whether a module has parameters, and none of those that are read."""
    own = [id(x) for x in module.parameters()]
    return bool(own) and read.isdisjoint(own)


def _identities(model: nn.Module) -> tuple[int, ...]:
    return tuple(id(x) for x in (*model.parameters(), *model.buffers()))
