"""A module in the place of another: of its class, with its attributes and its methods.

Methods of the other's class run with what stands in as ``self``. So ``generate()`` of a language
model calls what stands in, and not the float model.
"""

from __future__ import annotations

import copy
import importlib
import operator
import pickle
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

__all__ = ["Original", "StandIn", "class_of", "made"]

S = TypeVar("S", bound="StandIn")

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
"""Dictionaries that a stand-in and its original have in common."""
_CLASSES: dict[tuple[Any, ...], Any] = {}
"""(class of a stand-in, class of an original, hidden attributes) -> a class that is both."""
_MADE_ANEW = ("_stands_for", "forward")
_NOT_PINNED = ("forward", "__init__", "__doc__", "__module__", "__dict__", "__weakref__")
_PICKLED: dict[int, tuple[Any, bool]] = {}
"""id -> weak reference to what has it, and whether that can be pickled."""
_MOST = 1024


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a stand-in for ``module`` is of; ``nn.Module`` for a scripted module.

    Of what stands in for another already, it is that of the other.

    A class of ours that takes the place of another in a twin has that as ``stands_for``.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return nn.Module
    if isinstance(module, StandIn):
        return module._stands_for.cls
    found: type[nn.Module] = vars(type(module)).get("stands_for", type(module))
    return found


@dataclass
class Original:
    """What a stand-in stands for.

    Args:
        cls: the class of the module.
        twin: a twin of the module, if its own Python runs: its attributes may change.
        kept: else the attributes.
    """

    cls: type[nn.Module]
    twin: nn.Module | None = None
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def attributes(self) -> dict[str, Any]:
        """Plain attributes; what a module keeps elsewhere is shared."""
        return self.kept if self.twin is None else vars(self.twin)

    def get(self, instance: StandIn, name: str) -> Any:
        """The attribute; of a method that of ``instance``."""
        value = self.attributes[name]
        if isinstance(value, types.MethodType) and value.__self__ is self.twin is not None:
            return types.MethodType(value.__func__, instance)
        return value


class StandIn(nn.Module):
    """Base of what stands in for a module; its instances are made by :func:`made`.

    What ``nn.Module`` has (``to``, ``state_dict``) is that of ``nn.Module``, whatever the other's
    class makes of it. Everything else is the other's.
    """

    _stands_for: Original
    _made_of: ClassVar[tuple[type[StandIn], type[nn.Module]]]

    def __init_subclass__(cls) -> None:
        """What the other's class does with its subclasses is no matter of a stand-in's."""
        cls._made_of = cls, nn.Module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original: Original | None = self.__dict__.get("_stands_for")
            if original is None or name[:2] == "__" == name[-2:]:
                raise
        if name in original.attributes:
            return original.get(self, name)
        other: Callable[..., Any] | None = getattr(original.cls, "__getattr__", None)
        if other is not None and other is not nn.Module.__getattr__:
            return other(self, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        own = self.__dict__
        original: Original | None = own.get("_stands_for")
        if (
            original is None
            or name in own
            or isinstance(value, (nn.Module, nn.Parameter))
            or any(name in own[entries] for entries in _SHARED)
            or hasattr(getattr(type(self), name, None), "__set__")
        ):
            if original is not None and isinstance(value, (nn.Module, nn.Parameter)):
                original.attributes.pop(name, None)
            super().__setattr__(name, value)
        else:
            original.attributes[name] = value

    def __delattr__(self, name: str) -> None:
        original: Original | None = self.__dict__.get("_stands_for")
        if original is not None and name in original.attributes:
            del original.attributes[name]
        else:
            super().__delattr__(name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._stands_for.attributes})

    def __reduce_ex__(self, protocol: Any) -> Any:
        base, cls = type(self)._made_of
        name = _ClassName.of(cls)
        return _blank, (base, name, _hidden(name.find(), self._stands_for)), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        original = self._stands_for
        saved = {name: x for name, x in original.kept.items() if not _is_made_anew(x)}
        kept = {name: x for name, x in saved.items() if _can_be_pickled(x)}
        own = {name: x for name, x in self.__dict__.items() if name not in _MADE_ANEW}
        state = {name: x for name, x in own.items() if not _is_made_anew(x)}
        return state | {"_stands_for": (original.twin, kept)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        twin, kept = state["_stands_for"]
        original = Original(type(self)._made_of[1], twin, kept)
        nn.Module.__setstate__(self, state | {"_stands_for": original})

    def __deepcopy__(self: S, memo: dict[int, Any]) -> S:
        new: S = object.__new__(type(self))
        memo[id(self)] = new
        original = self._stands_for
        rest = {name: x for name, x in self.__dict__.items() if name not in _MADE_ANEW}
        twin, rest = copy.deepcopy((original.twin, rest), memo)
        kept = {name: _copied_if_possible(x, memo) for name, x in original.kept.items()}
        new.__setstate__(rest | {"_stands_for": (twin, kept)})
        return new


def made(base: type[S], twin: nn.Module, *, runs: bool) -> S:
    """A stand-in for a module, whose children, parameters and buffers are those of a twin of it.

    Args:
        base: the class of the stand-in.
        twin: of the module.
        runs: whether the module's own Python runs, in ``twin``.
    """
    original = Original(class_of(twin), twin if runs else None)
    if not runs:
        own = {name: x for name, x in vars(twin).items() if name not in _module_attributes()}
        own.pop("forward", None)
        original.kept = own
    new: S = object.__new__(_class(base, original.cls, _hidden(original.cls, original)))
    nn.Module.__init__(new)
    new.__dict__.update((name, vars(twin)[name]) for name in _SHARED)
    new.__dict__.update({"training": False, "_stands_for": original})
    for name, value in original.kept.items():
        if isinstance(value, types.MethodType) and value.__self__ is twin:
            original.kept[name] = types.MethodType(value.__func__, new)
    return new


def _hidden(cls: type[nn.Module], original: Original) -> frozenset[str]:
    """Attributes of a class in whose place an instance has others."""
    own = original.attributes.keys() - _module_attributes() - {"forward"}
    return frozenset(name for name in own if hasattr(cls, name))


@cache
def _module_attributes() -> frozenset[str]:
    return frozenset(vars(nn.Module()))


class _Attribute:
    """Of a class: an instance may have another value, which a stand-in finds with its original."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def __get__(self, instance: StandIn | None, owner: type | None = None) -> Any:
        if instance is not None and self.name in instance._stands_for.attributes:
            return instance._stands_for.get(instance, self.name)
        get = getattr(type(self.value), "__get__", None)
        return self.value if get is None else get(self.value, instance, owner)

    def __set__(self, instance: StandIn, value: Any) -> None:
        instance._stands_for.attributes[self.name] = value

    def __delete__(self, instance: StandIn) -> None:
        del instance._stands_for.attributes[self.name]


def _class(base: type[S], cls: type[nn.Module], hidden: frozenset[str]) -> type[S]:
    """A class that is both.

    Args:
        base: goes first.
        cls: the original's.
        hidden: attributes of ``cls`` in whose place instances have others.
    """
    if cls is nn.Module:
        return base
    key = base, cls, hidden
    if key not in _CLASSES:
        _CLASSES[key] = _new_class(base, cls, hidden)
    found: type[S] = _CLASSES[key]
    return found


def _new_class(base: type[S], cls: type[nn.Module], hidden: frozenset[str]) -> type[S]:
    name = f"{base.__name__}[{cls.__name__}]"
    namespace: dict[str, Any] = {"__module__": base.__module__, "__qualname__": name}
    theirs: dict[str, Any] = {}
    for each in reversed(cls.__mro__[: cls.__mro__.index(nn.Module)]):
        theirs.update(vars(each))
    ours = {name for each in base.__mro__[: base.__mro__.index(nn.Module)] for name in vars(each)}
    for name, value in theirs.items():
        if name in ours or name in _NOT_PINNED:
            continue
        if name in vars(nn.Module):
            namespace[name] = vars(nn.Module)[name]
        elif name[:2] == "__" == name[-2:] or hasattr(type(value), "__set__"):
            continue
        elif name in hidden or not hasattr(type(value), "__get__"):
            namespace[name] = _Attribute(name, value)
    found: type[S] = types.new_class(cls.__name__, (base, cls), {}, lambda x: x.update(namespace))
    found._made_of = base, cls
    return found


# Copies and pickles


def _is_made_anew(value: Any) -> bool:
    """Whether it is a method that was put in the place of another for this instance alone."""
    return getattr(getattr(value, "__func__", None), "made_anew", False)


@dataclass(frozen=True)
class _ClassName:
    """A class by name: what stands in for its instances loads without it."""

    module: str
    name: str

    @classmethod
    def of(cls, found: type[nn.Module]) -> _ClassName:
        """The name of the class, or of its first base that can be found again."""
        names = (cls(each.__module__, each.__qualname__) for each in found.__mro__)
        found_again = zip(names, found.__mro__, strict=False)
        return next(name for name, each in found_again if name.find() is each)

    def find(self) -> type[nn.Module]:
        """The class; ``nn.Module`` if there is none of that name any more."""
        try:
            found = operator.attrgetter(self.name)(importlib.import_module(self.module))
        except (ImportError, AttributeError):
            found = None
        return found if isinstance(found, type) and issubclass(found, nn.Module) else nn.Module


def _blank(base: type[S], name: _ClassName, hidden: frozenset[str]) -> S:
    new: S = object.__new__(_class(base, name.find(), hidden))
    return new


def _can_be_pickled(value: Any) -> bool:
    """Whether ``pickle`` takes it; asked once of each object that may occur in many places."""
    if isinstance(value, _CONSTANTS):
        return True
    known = _PICKLED.get(id(value))
    if known is not None and known[0]() is value:
        return known[1]
    try:
        pickle.dumps(value)
        can = True
    except Exception:  # whatever the object raises
        can = False
    try:
        reference = weakref.ref(value)
    except TypeError:
        return can
    if len(_PICKLED) >= _MOST:
        _PICKLED.clear()
    _PICKLED[id(value)] = reference, can
    return can


def _copied_if_possible(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy; the value itself if that cannot be copied."""
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever the object raises
        return value
