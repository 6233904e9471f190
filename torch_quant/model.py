"""A float model as the package knows it: what was captured of it, and what it looked like."""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from torch_quant.core.methods import Transform
from torch_quant.core.plan import FloatOp, QuantPlan
from torch_quant.errors import CaptureFailed, InvalidConfig, NotCalibrated, UnsupportedOp
from torch_quant.graph.capture import CapturedModule, Reopened
from torch_quant.graph.dynamic import check_arguments
from torch_quant.graph.effects import attributes
from torch_quant.graph.executor import Executor, owner_of
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.macs import GLUE
from torch_quant.graph.policy import CapturePolicy
from torch_quant.graph.sites import Site, find_sites, source, weights
from torch_quant.graph.twin import twin_of
from torch_quant.passes.functionalize import writes_attributes
from torch_quant.passes.prepare import Prepared, prepare

__all__ = [
    "CapturedModel",
    "Fingerprint",
    "call_example",
    "check_model",
    "example_call",
    "fingerprint",
    "rebind",
    "run_example",
]

logger = logging.getLogger("torch_quant")

Fingerprint = dict[str, str]
"""Module, parameter or buffer name -> class, or shape and dtype."""


def fingerprint(model: nn.Module) -> Fingerprint:
    """What must not change between calibration and quantization; values may."""
    facts = {f"module {name or '(root)'}": type(m).__name__ for name, m in model.named_modules()}
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        facts[f"tensor {name}"] = f"{tuple(x.shape)} {x.dtype}"
    return facts


def check_same(before: Fingerprint, model: nn.Module) -> None:
    """Raise :class:`NotCalibrated` if ``model`` is not the one that ``before`` was taken of."""
    check_fingerprint(before, fingerprint(model))


def check_fingerprint(before: Fingerprint, after: Fingerprint) -> None:
    """Raise :class:`NotCalibrated` unless both are of one model."""
    for name in (*before, *after):
        if before.get(name) != after.get(name):
            raise NotCalibrated(
                f"the model is not the one that was calibrated: {name} was "
                f"{before.get(name, 'absent')} and is {after.get(name, 'absent')}; "
                "use a new Quantizer() for it and calibrate again"
            )


def check_model(model: nn.Module, devices: frozenset[str], backend: str) -> None:
    """Raise an error that says what to do if ``model`` cannot be taken at all."""
    if not isinstance(model, nn.Module):
        raise InvalidConfig(f"expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidConfig("the model is TorchScript already; give the nn.Module it came from")
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if x.is_floating_point() and x.dtype != torch.float32 and isinstance(x, nn.Parameter):
            raise UnsupportedOp(
                f"parameter {name} is {x.dtype}; expected torch.float32: quantize "
                "copy.deepcopy(model).float()"
            )
        if x.device.type not in devices:
            raise InvalidConfig(
                f"{name} is on {x.device}, but backend {backend} runs on "
                f"{', '.join(sorted(devices))}: quantize copy.deepcopy(model).cpu(), or use "
                "Backend.REFERENCE"
            )


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
        self.root = CapturedModule(twin_of(model), dynamic=dynamic, policy=policy)
        check_arguments(dynamic, self.root.signature)
        self.version = 0
        self.declined: dict[str, dict[str, str]] = {}
        """Backend -> site -> why its graphs have it in float although the plan has not."""
        self.settled: dict[Any, Mapping[str, Transform | None]] = {}
        """Optional transform and the sites that ask for it -> where it helps."""
        self.settled_on: Any = None
        """The ranges and weights that this rests on."""
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
        twin.root = self.root.copied()
        twin._prepared, twin.settled = dict(self._prepared), dict(self.settled)
        return twin

    def refresh(self, model: nn.Module) -> None:
        """Notice what has changed in ``model`` since it was captured.

        Where Parameter and buffer objects were replaced (``load_state_dict(assign=True)`` does so),
        the graphs read the new ones. Where another attribute was, they are captured again.
        """
        self._compare_attributes(model)
        if self.parameters == _identities(model):
            return
        self.parameters = _identities(model)
        self.version += 1
        twin = twin_of(model)
        for submodule in self.root.walk():
            submodule.module = twin.get_submodule(submodule.path)
            for _, graph in submodule.graphs:
                prepared = self._prepared.get(id(graph))
                graphs = [graph.gm] if prepared is None else [graph.gm, prepared[1].canonical]
                for gm in graphs:
                    rebind(gm, submodule.module)

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
        if self.altered:
            raise NotCalibrated(
                f"{', '.join(self.altered)} of the model changed since it was calibrated: run data "
                "through the proxy of quantizer.calib(model) again, or give "
                f"quantizer.{method}(model, example_inputs=...) to keep the ranges"
            )
        raise NotCalibrated(
            "no calibration data was seen: run it through what quantizer.calib(model) returns"
            if no_data and method in ("quantize", "qat")
            else "this model object is not captured yet (it was not calibrated, its ranges were "
            f"loaded, or it is a copy): quantizer.{method}(model, example_inputs=...)"
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
        return tuple(
            submodule.path
            for submodule in self.root.walk()
            if not (submodule.called or submodule.borrowed or submodule.readers)
            and any(True for _ in submodule.module.parameters())
        )

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


def _identities(model: nn.Module) -> tuple[int, ...]:
    return tuple(id(x) for x in (*model.parameters(), *model.buffers()))


def run_example(captured: CapturedModel, example_inputs: Any) -> Any:
    """Capture by one call, with ``example_inputs`` as :func:`example_call` reads them.

    Raises:
        CaptureFailed: they do not fit the model.
    """
    try:
        while True:
            executor = Executor(captured.root, lambda submodule, graph, call: graph(call))
            with contextlib.suppress(Reopened):
                return call_example(executor.watched, example_inputs)
    except CaptureFailed as error:
        if not isinstance(example_inputs, list):
            raise
        raise CaptureFailed(
            f"{error}. The example_inputs are a list, which is one input; several are a tuple: "
            "example_inputs=(x, y)"
        ) from error


def example_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of the call that ``example_inputs`` stand for, the same everywhere.

    A tuple holds the positional inputs, as for ``torch.export.export`` and ``torch.onnx.export``; a
    mapping holds keywords; anything else is the one input. So a list is one input that is a list,
    as detectors take their images, and ``(batch,)`` is one input that may be a dictionary.

    Raises:
        InvalidConfig: the keywords are no strings, or there is no example.

    >>> example_call((1, 2)), example_call([1, 2])
    (((1, 2), {}), (([1, 2],), {}))
    >>> example_call({"x": 1}), example_call(({"x": 1},))
    (((), {'x': 1}), (({'x': 1},), {}))
    """
    if example_inputs is None:
        raise InvalidConfig(
            "example_inputs is None; give a tensor, a tuple of positional inputs or a dict of "
            "keywords"
        )
    if isinstance(example_inputs, Mapping):
        if wrong := [key for key in example_inputs if not isinstance(key, str)]:
            raise InvalidConfig(
                f"example_inputs is a dict, so its keys are the names of inputs, but one is "
                f"{wrong[0]!r}; if the model takes the dict itself, give example_inputs=(batch,)"
            )
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


@torch.no_grad()
def call_example(model: Callable[..., Any], example_inputs: Any) -> Any:
    """Call ``model`` with ``example_inputs`` as :func:`example_call` reads them."""
    args, kwargs = example_call(example_inputs)
    return model(*args, **kwargs)
