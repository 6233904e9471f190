"""Runs a model while it is captured: graphs where there are some, else Python over executors.

Code around a region sees an executor in the place of its module, and may reach into it.
"""

from __future__ import annotations

import copy
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from torch_quant.graph.calls import Call
from torch_quant.graph.capture import Region, Reopened
from torch_quant.graph.effects import Watch
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.hooks import give_hooks
from torch_quant.graph.macs import counted, uncounted
from torch_quant.graph.running import CAPTURING, no_fastpath
from torch_quant.graph.shadow import shadow
from torch_quant.nn.forward import SignedForward
from torch_quant.nn.stand_in import class_of

__all__ = ["Executor", "Host", "Runner", "glue"]


class Runner(Protocol):
    """Runs a captured graph in some transformed way."""

    def __call__(self, region: Region, graph: CapturedGraph, call: Call) -> Any: ...


class Host(Protocol):
    """Is told of every call of an executor, and makes it."""

    def __call__(
        self, executor: Executor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any: ...


class Executor(nn.Module):
    """A region that can be called like its module; captures as calls come in.

    It keeps a state of its own where the module keeps one, which begins as the module's.

    Args:
        region: what to run.
        run: how to run its graphs.
        host: through whom calls go.
    """

    opaque = True
    """To what watches the attributes of a module."""

    def __init__(self, region: Region, run: Runner, host: Host | None = None) -> None:
        nn.Module.__init__(self)
        self.__dict__["region"] = region  # no submodule: its parameters are the user's
        self.run, self.host = run, host
        self.__dict__["_glue"] = None
        self.forward = SignedForward(self._called, region.signature)
        give_hooks(self, region.hooks)
        self.__dict__["training"] = False

    @property  # type: ignore[misc]
    def __class__(self) -> type[nn.Module]:  # type: ignore[override]
        """That of the module, for code that asks ``isinstance``."""
        region = self.__dict__.get("region")
        return type(self) if region is None else class_of(region.module)

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
        """The module's own Python over executors of its children, to be run."""
        self.region.entered = True
        return self.twin()

    def twin(self) -> nn.Module:
        """The same, to be looked at."""
        if self._glue is None:
            with CAPTURING:
                self.region.open()
                if self._glue is None:
                    made = glue(self.region, lambda child: type(self)(child, self.run, self.host))
                    self.__dict__["_glue"] = made
        return self._glue  # type: ignore[no-any-return]

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Those of the float module: code around it asks ``next(self.parameters()).dtype``."""
        yield from self.region.module.named_modules(memo, prefix, remove_duplicate)

    def __getattr__(self, name: str) -> Any:
        """Glue may reach into a child: for its attributes, or to call parts of it."""
        try:
            return nn.Module.__getattr__(self, name)  # no super(), for the sake of `__class__`
        except AttributeError:
            return _reach(self, "", name)

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        return self.execute(*args, **kwargs) if self.host is None else self.host(self, args, kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """Make a call."""
        with uncounted():
            return self._run(*args, **kwargs)

    def watched(self, *args: Any, **kwargs: Any) -> Any:
        """The first call of its kind, which shows what the module's own Python keeps.

        Raises:
            Reopened: it keeps something; nothing of the call is left, and each proxy will have its
                own from now on.
        """
        if not self.region.by_choice:
            return self(*args, **kwargs)
        watch = Watch({"": self.glue()})
        outputs = self(*args, **kwargs)
        if kept := [name for name in watch.changed() if name not in self.region.state]:
            with torch.no_grad():
                watch.restore()
            self.region.state = (*self.region.state, *dict.fromkeys(kept))
            self.region.written.update(kept)
            raise Reopened
        return outputs

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

    @property  # type: ignore[misc]
    def __class__(self) -> type[nn.Module]:  # type: ignore[override]
        """That of the part, for code that asks ``isinstance``."""
        return class_of(self._owner.region.module.get_submodule(self._path))

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
    for path in region.state:
        owner, name = owner_of(twin, path)
        if name in vars(owner) and name not in ("_modules", "_parameters", "_buffers"):
            vars(owner)[name] = copy.deepcopy(vars(owner)[name])
    return twin


def owner_of(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The innermost module on a dotted path, and the name of what it has there."""
    name, _, rest = path.partition(".")
    child = module._modules.get(name)
    if child is None or not rest:
        return module, name
    return owner_of(child, rest)
