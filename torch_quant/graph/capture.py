"""A model as captured regions: the whole of it if it exports, else each largest part that does.

Capture is driven by real calls. A region that does not export becomes glue: its forward runs in
Python, on a shadow whose children are regions again.
"""

from __future__ import annotations

import copy
import logging
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

from torch_quant.errors import CaptureFailed
from torch_quant.graph.binding import bind, signature_of
from torch_quant.graph.calls import Call, flatten_call
from torch_quant.graph.dynamic import free_axes
from torch_quant.graph.effects import KeepsState
from torch_quant.graph.export import CapturedGraph, ModelRefuses
from torch_quant.graph.hooks import give_hooks, hooked, take_hooks
from torch_quant.graph.kinds import Kind
from torch_quant.graph.macs import counted, uncounted
from torch_quant.graph.running import CAPTURING, no_fastpath
from torch_quant.graph.shadow import shadow
from torch_quant.graph.widen import check_constants, export_call

__all__ = ["Executor", "Region", "Reopened", "Runner"]

logger = logging.getLogger("torch_quant")


class Reopened(Exception):
    """A graph had to become pieces while it was used; the call has to be made again."""


class Region:
    """One module of a model and the graphs captured of it.

    Args:
        module: the module's shadow, in eval mode; the user's hooks are taken off it.
        path: its path in the whole model, empty for the model itself.
        dynamic: the free dimensions of those inputs of which not all may be.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str = "",
        dynamic: Mapping[str, frozenset[int]] = MappingProxyType({}),
    ) -> None:
        self.module = module
        self.path = path
        self.dynamic = dynamic
        self.hooks = take_hooks(module)
        self.signature = signature_of(module.forward)
        self.graphs: list[tuple[Kind, CapturedGraph]] = []
        self.children: dict[str, Region] = {}
        self.failure = ""
        self.opened = False
        """Whether its children are regions: it is captured in pieces, or others call its parts."""
        self.state: tuple[str, ...] = ()
        """Attributes that it keeps from one call to the next."""
        self.written: set[str] = set()
        """Attributes that its calls write, those that none reads included."""
        self.borrowed: set[str] = set()
        """Values that the code around it has read from it, as ``child.attribute``."""
        self.lists_parameters = False
        """Whether the code around it has asked for its parameters."""
        self.plain = False
        """Whether it runs as the float module, which its pieces were found to differ from."""
        self.called = False
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
        except ModelRefuses:
            self.called = before
            raise
        except CaptureFailed as error:
            self.written.update(error.leaves_behind)
            if isinstance(error, KeepsState):
                self.state = error.names
            self.split(str(error))
            return None

    def bound(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments in their normal form."""
        return bind(self.signature, args, kwargs)

    def _capture(self, call: Call, served: Sequence[Kind] = ()) -> tuple[Call, CapturedGraph]:
        with CAPTURING:
            if found := self.find(call):  # another thread was here
                return found
            if below := hooked(self.module):
                raise CaptureFailed(f"a hook on {below} runs at each of its calls")
            where = self.path or "the model"
            kinds = served or [kind for kind, _ in self.graphs]
            check_constants(kinds, call, where, splits=not served)
            found = export_call(self.module, call, self.graphs, path=self.path, free=self._free)
            self.written.update(found[1].leaves_behind)
            self.graphs.append((found[0].signature, found[1]))
        logger.info("captured %s as one graph", where)
        return found

    def _free(self, call: Call) -> list[frozenset[int]] | None:
        return free_axes(self.dynamic, call, self.signature) if self.dynamic else None

    def add(self, call: Call, served: Sequence[Kind]) -> tuple[Kind, CapturedGraph]:
        """A graph for ``call``, of whoever serves other kinds with graphs of this region.

        Raises:
            CaptureFailed: it must run in pieces, or too many values of a constant are served.
        """
        _, graph = self.find(call) or self._capture(call, served)
        self.called = True
        return next((kind, each) for kind, each in self.graphs if each is graph)

    def copied(self) -> Region:
        """A region over the same module and graphs, children too, with lists of its own."""
        twin = copy.copy(self)
        twin.graphs, twin.written = list(self.graphs), copy.copy(self.written)
        twin.borrowed = set(self.borrowed)
        twin.children = {path: child.copied() for path, child in self.children.items()}
        return twin

    def split(self, reason: str) -> None:
        """Run as Python over regions from now on, for calls that no graph serves."""
        with CAPTURING:
            if not self.failure:
                self.failure = reason
                logger.info("%s is captured in pieces: %s", self.path or "the model", reason)
            self.open()

    def open(self) -> None:
        """Make the children regions, once."""
        with CAPTURING:
            if self.opened:
                return
            for name, child in _callable_children(self.module):
                path = f"{self.path}.{name}".strip(".")
                self.children[path] = Region(child, path)
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

    def walk(self) -> Iterator[Region]:
        """This region and all below it."""
        yield self
        for child in self.children.values():
            yield from child.walk()


def _callable_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Direct children, through containers that are never called themselves.

    A scripted module has none: what it calls is compiled into it.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return
    seen: set[int] = set()
    for name, child in module.named_children():
        scripted = isinstance(child, torch.jit.ScriptModule)
        if not scripted and type(child).forward is nn.Module.forward:
            inner = [(f"{name}.{below}", m) for below, m in _callable_children(child)]
        else:
            inner = [(name, child)]
        for path, found in inner:
            if id(found) not in seen:
                seen.add(id(found))
                yield path, found


class Runner(Protocol):
    """Runs a captured graph in some transformed way."""

    def __call__(self, region: Region, graph: CapturedGraph, call: Call) -> Any: ...


class Executor(nn.Module):
    """A region that can be called like its module; captures as calls come in.

    It keeps a state of its own where the module keeps one, which begins as the module's.

    Args:
        region: what to run.
        run: how to run its graphs.
    """

    def __init__(self, region: Region, run: Runner) -> None:
        super().__init__()
        self.__dict__["region"] = region  # no submodule: its parameters are the user's
        self.run = run
        self.__dict__["_glue"] = None
        give_hooks(self, region.hooks)
        self.eval()

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._layers())

    def __getitem__(self, index: Any) -> Any:
        return self._layers()[index]

    def __len__(self) -> int:
        return len(self.region.module)

    def __bool__(self) -> bool:
        return not hasattr(self.region.module, "__len__") or len(self) > 0

    def _layers(self) -> Any:
        """Glue that calls the layers of a sequence one by one: each is a region then."""
        self.region.split("its layers are called one by one")
        self.region.called = True
        return self.glue()

    def glue(self) -> nn.Module:
        """The module's own Python over executors of its children."""
        if self._glue is None:
            with CAPTURING:
                self.region.open()
                if self._glue is None:
                    made = glue(self.region, lambda child: type(self)(child, self.run))
                    self.__dict__["_glue"] = made
        return self._glue  # type: ignore[no-any-return]

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Those of the float module: code around it asks ``next(self.parameters()).dtype``."""
        self.region.lists_parameters = True
        yield from self.region.module.named_modules(memo, prefix, remove_duplicate)

    def __getattr__(self, name: str) -> Any:
        """Glue may reach into a child: for its attributes, or to call parts of it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return _reach(self, "", name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with uncounted():
            return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.region.plain:
            with counted(self.region.glue_macs):
                return self.region.module(*args, **kwargs)
        resolved = self.region.resolve(args, kwargs)
        if resolved is not None:
            call, graph = resolved
            return self.run(self.region, graph, call)
        with no_fastpath(), counted(self.region.glue_macs):
            return self.glue()(*args, **kwargs)


class _Part:
    """A part of a region that the code around it reaches into: called, it is a region itself.

    Args:
        owner: runs the region.
        path: of the part within the region's module.
    """

    def __init__(self, owner: Executor, path: str) -> None:
        self.__dict__.update(_owner=owner, _path=path)

    def _opened(self) -> Any:
        self._owner.region.called = True
        return operator.attrgetter(self._path)(self._owner.glue())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._opened()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return _reach(self._owner, self._path, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._opened())

    def __getitem__(self, index: Any) -> Any:
        return self._opened()[index]

    def __len__(self) -> int:
        return len(self._owner.region.module.get_submodule(self._path))


def _reach(owner: Executor, path: str, name: str) -> Any:
    """The attribute ``name`` of the part at ``path``, as the code around the region sees it."""
    module = owner.region.module.get_submodule(path)
    value = getattr(module, name)
    where = f"{path}.{name}".strip(".")
    if isinstance(value, nn.Module):
        parts = owner.region.module.named_modules()
        found = next((known for known, each in parts if each is value), "")
        return _Part(owner, found) if found else value
    if isinstance(value, types.MethodType) and value.__self__ is module:
        # Its own Python, over regions: what it calls must not run in float beside them.
        return getattr(_Part(owner, path)._opened() if path else owner.glue(), name)
    if not path and name in vars(owner._glue or owner.region.module) and owner.region.failure:
        return vars(owner.glue())[name]  # its own code may have written it
    if where in owner.region.written and owner.region.graphs:
        owner.region.graphs.clear()
        owner.region.split(f"the code around it reads {name}, which its calls write")
        raise Reopened
    owner.region.borrowed.add(where)
    return value


def glue(region: Region, make: Callable[[Region], nn.Module]) -> nn.Module:
    """The region's module with every child region replaced by what ``make`` gives for it.

    Attributes that it keeps between its calls are copies.
    """
    twin = shadow(region.module, {child.module: make(child) for child in region.children.values()})
    for name in {name.partition(".")[0] for name in region.state} - set(twin._modules.keys()):
        if name in vars(twin):
            vars(twin)[name] = copy.deepcopy(vars(twin)[name])
    return twin
