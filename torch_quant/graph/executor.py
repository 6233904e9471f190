"""Runs a model while it is captured: graphs where there are some, else Python over executors.

Code around a module sees an executor in the place of its module, and may reach into it.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import sys
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn

from torch_quant.graph.calls import Call
from torch_quant.graph.capture import CapturedModule, Reopened
from torch_quant.graph.effects import Watch
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.hooks import give_hooks
from torch_quant.graph.macs import MacCounter, counted, follow, uncounted
from torch_quant.graph.running import CAPTURING, no_fastpath
from torch_quant.graph.twin import twin_of
from torch_quant.graph.walks import walked
from torch_quant.nn.forward import SignedForward
from torch_quant.nn.stand_in import class_of

__all__ = ["Executor", "Host", "Runner", "glue"]


class Runner(Protocol):
    """Runs a captured graph in some transformed way."""

    def __call__(self, submodule: CapturedModule, graph: CapturedGraph, call: Call) -> Any: ...


class Host(Protocol):
    """Is told of every call of an executor, and makes it."""

    def __call__(
        self, executor: Executor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any: ...


_Looks = list[tuple[CapturedModule, types.CodeType, nn.Parameter]]
_LOOKS: ContextVar[_Looks | None] = ContextVar("torch_quant_looks", default=None)
"""Parameters of children that the Python code which runs has read: whose, by which code, which."""


@contextlib.contextmanager
def _looking(counter: MacCounter | None) -> Iterator[None]:
    """While Python code runs: find out which code computes with the parameters that it reads."""
    looks: _Looks | None = None if counter is None else []
    token = _LOOKS.set(looks)
    try:
        yield
    finally:
        _LOOKS.reset(token)
        for submodule, code, value in looks or ():
            computes = counter is not None and counter.has_read(value)
            (submodule.computers if computes else submodule.lookers).add(code)


class Executor(nn.Module):
    """A captured module that can be called like the float one; captures as calls come in.

    It keeps a state of its own where the module keeps one, which begins as the module's.

    Args:
        submodule: what to run.
        run: how to run its graphs.
        host: through whom calls go.
    """

    opaque = True
    """To what watches the attributes of a module."""

    def __init__(self, submodule: CapturedModule, run: Runner, host: Host | None = None) -> None:
        nn.Module.__init__(self)
        self.__dict__["submodule"] = submodule  # not registered: its parameters are the user's
        self.run, self.host = run, host
        self.__dict__["_glue"] = None
        self.forward = SignedForward(self._called, submodule.signature)
        give_hooks(self, submodule.hooks)
        self.__dict__["training"] = False

    @property  # type: ignore[misc]
    def __class__(self) -> type[nn.Module]:  # type: ignore[override]
        """That of the module, for code that asks ``isinstance``."""
        submodule = self.__dict__.get("submodule")
        return type(self) if submodule is None else class_of(submodule.module)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._layers())

    def __getitem__(self, index: Any) -> Any:
        return self._layers()[index]

    def __len__(self) -> int:
        return len(self.submodule.module)

    def __bool__(self) -> bool:
        return not hasattr(self.submodule.module, "__len__") or len(self) > 0

    def _layers(self) -> Any:
        """Glue that calls the layers of a sequence one by one: each is captured then."""
        self.submodule.split("its layers are called one by one")
        self.submodule.called = True
        return self.glue()

    def glue(self) -> nn.Module:
        """The module's own Python over executors of its children, to be run."""
        self.submodule.entered = True
        return self.twin()

    def twin(self) -> nn.Module:
        """The same, to be looked at."""
        if self._glue is None:
            with CAPTURING:
                self.submodule.open()
                if self._glue is None:
                    made = glue(
                        self.submodule, lambda child: type(self)(child, self.run, self.host)
                    )
                    self.__dict__["_glue"] = made
        return self._glue  # type: ignore[no-any-return]

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Those of the float module: code around it asks ``next(self.parameters()).dtype``."""
        modules = self.submodule.module.named_modules(memo, prefix, remove_duplicate)
        yield from walked(self.submodule, modules)

    def __getattr__(self, name: str) -> Any:
        """Glue may reach into a child: for its attributes, or to call parts of it."""
        try:
            return nn.Module.__getattr__(self, name)  # no super(), for the sake of `__class__`
        except AttributeError:
            return _reach(self, "", name)

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        host = self.host
        results = self.execute(*args, **kwargs) if host is None else host(self, args, kwargs)
        follow(results, self.submodule)
        return results

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
        if not self.submodule.by_choice:
            return self(*args, **kwargs)
        watch = Watch({"": self.glue()})
        outputs = self(*args, **kwargs)
        if kept := [name for name in watch.changed() if name not in self.submodule.state]:
            with torch.no_grad():
                watch.restore()
            self.submodule.state = (*self.submodule.state, *dict.fromkeys(kept))
            self.submodule.written.update(kept)
            raise Reopened
        return outputs

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.submodule.plain:
            with counted(self.submodule.glue_macs):
                return self.submodule.module(*args, **kwargs)
        resolved = self.submodule.resolve(args, kwargs)
        if resolved is not None:
            call, graph = resolved
            return self.run(self.submodule, graph, call)
        with no_fastpath(), counted(self.submodule.glue_macs) as counter, _looking(counter):
            return self.glue()(*args, **kwargs)


class _Part:
    """A part of a module that the code around it reaches into: called, it is captured itself.

    Args:
        owner: runs the module.
        path: of the part within the module.
    """

    def __init__(self, owner: Executor, path: str) -> None:
        self.__dict__.update(_owner=owner, _path=path)

    @property  # type: ignore[misc]
    def __class__(self) -> type[nn.Module]:  # type: ignore[override]
        """That of the part, for code that asks ``isinstance``."""
        return class_of(self._owner.submodule.module.get_submodule(self._path))

    def _opened(self) -> Any:
        self._owner.submodule.called = True
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
        return len(self._owner.submodule.module.get_submodule(self._path))


def _reach(owner: Executor, path: str, name: str) -> Any:
    """The attribute ``name`` of the part at ``path``, as the code around the module sees it."""
    module = owner.submodule.module.get_submodule(path)
    value = getattr(module, name)
    where = f"{path}.{name}".strip(".")
    if isinstance(value, nn.Module):
        parts = owner.submodule.module.named_modules()
        found = next((known for known, each in parts if each is value), "")
        return _Part(owner, found) if found else value
    if isinstance(value, types.MethodType) and value.__self__ is module:
        # Its own Python, over executors: what it calls must not run in float beside them.
        return getattr(_Part(owner, path)._opened() if path else owner.glue(), name)
    if not path and name in vars(owner._glue or owner.submodule.module) and owner.submodule.failure:
        return vars(owner.glue())[name]  # its own code may have written it
    if where in owner.submodule.written and owner.submodule.graphs:
        owner.submodule.graphs.clear()
        owner.submodule.split(f"the code around it reads {name}, which its calls write")
        raise Reopened
    if path or not isinstance(value, nn.Parameter):
        owner.submodule.borrowed.add(where)
        return value
    code = sys._getframe(2).f_code  # behind __getattr__
    owner.submodule.readers.setdefault(where, set()).add(code)
    if (looks := _LOOKS.get()) is not None:
        looks.append((owner.submodule, code, value))
    return value


def glue(submodule: CapturedModule, make: Callable[[CapturedModule], nn.Module]) -> nn.Module:
    """The module with every child module replaced by what ``make`` gives for it.

    Attributes that it keeps between its calls are copies.
    """
    twin = twin_of(
        submodule.module, {child.module: make(child) for child in submodule.children.values()}
    )
    for path in submodule.state:
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
