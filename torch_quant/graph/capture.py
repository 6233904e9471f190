"""Captured modules: the whole model if it exports, else each largest part that does.

Capture is driven by real calls. A module that does not export becomes glue: its forward runs in
Python, on a twin whose children are captured modules again.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, MappingProxyType
from typing import Any

import torch
from torch import nn

from torch_quant.errors import CaptureFailed
from torch_quant.graph.binding import bind, signature_of
from torch_quant.graph.blueprint import Blueprints
from torch_quant.graph.calls import Call, flatten_call
from torch_quant.graph.dynamic import free_axes
from torch_quant.graph.effects import KeepsState
from torch_quant.graph.export import CapturedGraph, ModelRefuses
from torch_quant.graph.hooks import hooked, take_hooks
from torch_quant.graph.kinds import Kind
from torch_quant.graph.leaves import layer_graph
from torch_quant.graph.policy import CapturePolicy, is_container
from torch_quant.graph.running import CAPTURING
from torch_quant.graph.widen import check_constants, export_call

__all__ = ["CapturedModule", "Reopened", "callable_children"]

_WHOLE = CapturePolicy()

logger = logging.getLogger("torch_quant")


class Reopened(Exception):
    """A graph had to become pieces while it was used; the call has to be made again."""


class CapturedModule:
    """One module of a model and the graphs captured of it.

    Args:
        module: the module's twin, in eval mode; the user's hooks are taken off it.
        path: its path in the whole model, empty for the model itself.
        dynamic: the free dimensions of those inputs of which not all may be.
        policy: which of its parts are graphs.
        blueprints: the graphs of other modules of the model.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str = "",
        dynamic: Mapping[str, frozenset[int]] = MappingProxyType({}),
        policy: CapturePolicy = _WHOLE,
        blueprints: Blueprints | None = None,
    ) -> None:
        self.module = module
        self.path = path
        self.dynamic = dynamic
        self.policy = policy
        self.blueprints = blueprints or Blueprints()
        self.hooks = take_hooks(module)
        self.signature = signature_of(module.forward)
        self.graphs: list[tuple[Kind, CapturedGraph]] = []
        self.children: dict[str, CapturedModule] = {}
        self.by_choice = not policy.is_target(path, module)
        """Whether it runs as Python because it was asked to."""
        self.failure = policy.reason if self.by_choice else ""
        self.opened = False
        """Whether its children are captured, too: it is in pieces, or others call its parts."""
        self.state: tuple[str, ...] = ()
        """Attributes that it keeps from one call to the next."""
        self.written: set[str] = set()
        """Attributes that its calls write, those that none reads included."""
        self.borrowed: set[str] = set()
        """Values that the code around it has read from it, as ``child.attribute``."""
        self.readers: dict[str, set[CodeType]] = {}
        """Parameters that the code around it has read -> which code."""
        self.lookers: set[CodeType] = set()
        """Code that was seen to ask parameters of it for dtype, device or sizes and no more."""
        self.computers: set[CodeType] = set()
        """Code that was seen to compute with them."""
        self.walks: set[str] = set()
        """Places of Python code that goes through all parameters or buffers of a part."""
        self.entered = False
        """Whether its own Python runs: it is in pieces, or others call methods and parts of it."""
        self.plain = False
        """Whether it runs as the float module, which its pieces were found to differ from."""
        self.called = False
        self.picks = False
        """Whether the code around it picks something by its results, as experts."""
        self.glue_macs: dict[str, int] = {}
        """Operator -> multiply-accumulates of its Python code, in the first call."""

    def find(self, call: Call) -> tuple[Call, CapturedGraph] | None:
        """The graph that serves ``call``, if one was captured, and the call as it takes it."""
        for kind, graph in self.graphs:
            accepted = kind.accept(call)
            if accepted is not None and graph.contract.mismatch(accepted) is None:
                return accepted, graph
        return None

    def resolve(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Call, CapturedGraph] | None:
        """The call and the graph for it, captured now if need be; None if it must run as glue.

        Raises:
            CaptureFailed: the inputs do not fit the module, or the float module fails on them.
        """
        args, kwargs = self.bound(args, kwargs)
        before, self.called = self.called, True
        if self.failure and not self.graphs:
            return None
        try:
            call = flatten_call(args, kwargs)
            found = self.find(call)
            if found is None and not self.failure:
                found = self._capture(call)
            return found
        except ModelRefuses as error:
            self.called = before
            if self._takes_other_names(error, kwargs):
                return self.resolve((), kwargs)
            raise
        except CaptureFailed as error:
            self.written.update(error.leaves_behind)
            if isinstance(error, KeepsState):
                self.state = error.names
            self.split(str(error))
            return None

    def _takes_other_names(self, error: ModelRefuses, named: dict[str, Any]) -> bool:
        """Whether a decorator hides the names of the arguments; they go by position from now on."""
        signature = self.signature
        renamed = isinstance(error.__cause__, TypeError) and "argument" in str(error.__cause__)
        if signature.by_position or not (signature.decorated and named and renamed):
            return False
        self.signature = signature.with_positions()
        return not self.graphs

    def bound(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments in their normal form."""
        return bind(self.signature, args, kwargs)

    def _capture(self, call: Call, served: Sequence[Kind] = ()) -> tuple[Call, CapturedGraph]:
        with CAPTURING:
            if found := self.find(call):  # another thread was here
                return found
            if below := self._hooked():
                raise CaptureFailed(f"a hook on {below} runs at each of its calls")
            if not served and (made := self.blueprints.find(self.module, call)):
                self.graphs.append((made[0], made[2]))
                return made[1:]
            if not served and not self.dynamic and (plain := layer_graph(self.module, call)):
                self.graphs.append((call.signature, plain))
                self.blueprints.add(self.module, *self.graphs[-1])
                return call, plain
            where = self.path or "the model"
            kinds = served or [kind for kind, _ in self.graphs]
            check_constants(kinds, call, where, splits=not served)
            found = export_call(self.module, call, self.graphs, path=self.path, free=self._free)
            self.written.update(found[1].leaves_behind)
            self.graphs.append((found[0].signature, found[1]))
            if self.path:
                self.blueprints.add(self.module, *self.graphs[-1])
        logger.info("captured %s as one graph", where)
        return found

    def _hooked(self) -> str:
        below = (each.path for each in list(self.walk())[1:] if any(each.hooks.values()))
        return hooked(self.module) or next(below, "")

    def _free(self, call: Call) -> list[frozenset[int]] | None:
        return free_axes(self.dynamic, call, self.signature) if self.dynamic else None

    def add(self, call: Call, served: Sequence[Kind]) -> tuple[Kind, CapturedGraph]:
        """A graph for ``call``, of whoever serves other kinds with graphs of this module.

        Raises:
            CaptureFailed: it must run in pieces, or too many values of a constant are served.
        """
        _, graph = self.find(call) or self._capture(call, served)
        self.called = True
        return next((kind, each) for kind, each in self.graphs if each is graph)

    def copied(self) -> CapturedModule:
        """The same over the same module and graphs, children too, with lists of its own."""
        twin = copy.copy(self)
        twin.graphs, twin.written = list(self.graphs), copy.copy(self.written)
        twin.borrowed = set(self.borrowed)
        twin.readers = {name: set(codes) for name, codes in self.readers.items()}
        twin.lookers, twin.computers = set(self.lookers), set(self.computers)
        twin.children = {path: child.copied() for path, child in self.children.items()}
        return twin

    def split(self, reason: str) -> None:
        """Run as Python over captured children from now on, for calls that no graph serves."""
        with CAPTURING:
            if not self.failure:
                self.failure = reason
                logger.info("%s is captured in pieces: %s", self.path or "the model", reason)
            self.open()

    def open(self) -> None:
        """Make captured modules of the children, once."""
        with CAPTURING:
            if self.opened:
                return
            if self.by_choice:
                parts = self.policy.targets(self.module)
            else:
                parts = callable_children(self.module)
            for name, child in parts:
                path = f"{self.path}.{name}".strip(".")
                made = CapturedModule(child, path, blueprints=self.blueprints)
                made.walks = self.walks
                self.children[path] = made
            self.opened = True

    def distrust(self, call: Call | None) -> None:
        """Run it otherwise: what served ``call`` gave another result than the float module."""
        if call is not None and self.find(call) is not None:
            self.graphs.clear()
            self.failure = "its graph gives another result than the module"
        else:
            self.plain = True
            self.failure = (
                "its pieces give another result than the module, which runs in their place"
            )
        self.split(self.failure)
        if self.plain:
            self.children.clear()
            self.glue_macs.clear()
        logger.warning(
            "%s: %s. Print quantizer.coverage(model) for what stays in float",
            self.path or "the model",
            self.failure,
        )

    def at(self, path: str) -> CapturedModule | None:
        """That at a path of the whole model, made if need be; None if there is no such."""
        if path == self.path:
            return self
        if self.path and not path.startswith(f"{self.path}."):
            return None
        self.open()
        found = (child.at(path) for child in self.children.values())
        return next((each for each in found if each is not None), None)

    def walk(self) -> Iterator[CapturedModule]:
        """This one and all below it."""
        yield self
        for child in self.children.values():
            yield from child.walk()


def callable_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Direct children, through containers that are never called themselves.

    A scripted module has none: what it calls is compiled into it.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return
    seen: set[int] = set()
    for name, child in module.named_children():
        if is_container(child):
            inner = [(f"{name}.{below}", m) for below, m in callable_children(child)]
        else:
            inner = [(name, child)]
        for path, found in inner:
            if id(found) not in seen:
                seen.add(id(found))
                yield path, found
