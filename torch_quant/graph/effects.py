"""What Python code changes besides its result: attributes of modules, and arguments.

A graph computes outputs from inputs and nothing else. So a module that leaves something for its
next call runs as Python; what a module does to its arguments is done to the caller's afterwards.
"""

from __future__ import annotations

import enum
import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torch_quant.errors import CaptureFailed
from torch_quant.graph.hooks import records_outputs

__all__ = [
    "CONTAINERS",
    "KeepsState",
    "Watch",
    "assign",
    "attributes_of",
    "content_of",
    "items_of",
    "kept_between_calls",
]

Array = NDArray[Any]
NOT_STATE = frozenset({"_parameters", "_buffers", "_modules", "training"})
"""Entries of a module's dictionary that others look after."""
CONTAINERS = (dict, list, set, deque)
_OPAQUE = (
    type, enum.Enum, types.ModuleType, types.FunctionType, types.MethodType, torch.Generator,
    torch.jit.ScriptModule,
)  # fmt: skip
_FOREIGN = ("torch", "logging", "threading", "weakref", "builtins", "functools", "_thread")
"""Packages whose own objects are not looked into."""
_DEEPEST = 12


class KeepsState(CaptureFailed):
    """A module reads what an earlier call of it has left.

    Args:
        names: what, as ``child.attribute``.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        shown = ", ".join(names[:3]) + (" and more" if len(names) > 3 else "")
        super().__init__(f"it keeps {shown} from one call to the next")
        self.names = self.leaves_behind = names


class KeepsElsewhere(KeepsState):
    """A module leaves tensors where none of its attributes leads."""

    def __init__(self) -> None:
        super().__init__(("tensors in a global, a closure or a class",))
        self.names = self.leaves_behind = ()


class Watch:
    """Remembers the attributes and containers that are reached from some objects.

    Parameters, child modules and values of buffers are not among them: graphs share those with the
    model.

    Args:
        roots: name -> a module, container or object.
        tensors: whether writing to a tensor or a NumPy array in place is a change too.

    >>> cache = {"keys": []}
    >>> watch = Watch({"cache": cache})
    >>> cache["keys"].append(1)
    >>> watch.changed()
    ['cache.keys']
    >>> watch.restore()
    >>> cache
    {'keys': []}
    """

    def __init__(self, roots: Mapping[str, Any], *, tensors: bool = True) -> None:
        self.roots = roots
        self._keeps_tensors = tensors
        self._seen: set[int] = set()
        self._saved: list[tuple[str, Any, Any]] = []
        self._tensors: list[tuple[str, Tensor, int, Tensor]] = []
        self._arrays: list[tuple[str, Array, Array]] = []
        for name, root in roots.items():
            self._walk(name, root, 0)

    def _walk(self, path: str, value: Any, depth: int) -> None:
        if id(value) in self._seen or depth > _DEEPEST or isinstance(value, (str, int, float)):
            return
        if getattr(type(value), "opaque", False):  # it stands for a module, with attributes of ours
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            watched = self._keeps_tensors and not value.is_inference()
            if watched and not isinstance(value, nn.Parameter):
                self._tensors.append((path, value, value._version, value.detach().clone()))
            return
        if isinstance(value, np.ndarray):
            if self._keeps_tensors and not value.dtype.hasobject:
                self._arrays.append((path, value, value.copy()))
            return
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                self._walk(f"{path}.{i}", item, depth + 1)
        elif (content := content_of(value)) is not None:
            self._saved.append((path, value, content))
            for key, item in items_of(content):
                self._walk(f"{path}.{key}".strip("."), item, depth + 1)
            if isinstance(value, nn.Module):
                # Graphs write to buffers in place; one that is replaced is another matter.
                self._seen |= {id(x) for x in value._buffers.values()}
                self._saved.append((path, value._buffers, dict(value._buffers)))
                for name, child in value._modules.items():
                    self._walk(f"{path}.{name}".strip("."), child, depth)

    def _differences(self) -> Iterator[tuple[str, Any, Any]]:
        """(path, object, key) of what is not as it was."""
        for path, value, before in self._saved:
            now = content_of(value)
            if isinstance(value, (list, deque)):
                if len(now) != len(before) or not all(map(_same, now, before)):
                    yield path, value, None
            elif isinstance(value, set):
                if now != before:
                    yield path, value, None
            else:
                for key in (*before, *(key for key in now if key not in before)):
                    if key not in now or key not in before or not _same(now[key], before[key]):
                        yield f"{path}.{key}".strip("."), value, key

    def _written(self) -> list[tuple[str, Array, Array]]:
        return [each for each in self._arrays if not _equal(*each[1:])]

    def _found(self) -> Iterator[tuple[str, Any, Any]]:
        """What differs, but for the hooks by which transformers collects hidden states.

        They are set at the first call that asks for such outputs, and compute nothing.
        """
        for path, value, key in self._differences():
            if not records_outputs(key, None if key is None else content_of(value).get(key)):
                yield path, value, key

    def changed(self) -> list[str]:
        """The paths of what is not as it was."""
        found = [path for path, _, _ in self._found()]
        found += [path for path, x, version, _ in self._tensors if x._version != version]
        return found + [path for path, _, _ in self._written()]

    def values(self) -> dict[str, Any]:
        """What stands now in the places that changed."""
        found = {
            path: list(value) if key is None else content_of(value).get(key)
            for path, value, key in self._found()
        }
        written = [(path, x) for path, x, version, _ in self._tensors if x._version != version]
        found |= {path: x.copy() for path, x, _ in self._written()}
        return found | {path: x.clone() for path, x in written}

    def spoil(self) -> None:
        """Write NaN over every tensor in the places that changed, so that reading it shows."""
        for _, value, key in list(self._differences()):
            if key is not None and key in content_of(value):
                _put(value, key, _spoiled(content_of(value)[key]))
            elif isinstance(value, (list, deque)):
                for i, item in enumerate(value):
                    value[i] = _spoiled(item)
        for _, x, version, _ in self._tensors:
            if x._version != version:
                x.copy_(_spoiled(x))
        for _, array, _ in self._written():
            array[...] = _spoiled(array)

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back as it was."""
        for path, value, before in self._saved:
            if not any(True for _ in Watch._differences(_one(path, value, before))):
                continue
            if isinstance(value, (list, deque)):
                value.clear()
                value.extend(before)
            elif isinstance(value, (set, dict)):
                value.clear()
                value.update(before)
            else:
                for key in content_of(value).keys() - before.keys():
                    _take(value, key)
                for key, x in before.items():
                    _put(value, key, x)
        for _, x, version, saved in self._tensors:
            if x._version != version:
                x.copy_(saved)
        for _, array, before in self._written():
            array[...] = before


def _one(path: str, value: Any, before: Any) -> Watch:
    watch = Watch({})
    watch._saved.append((path, value, before))
    return watch


def content_of(value: Any) -> Any:
    """A copy of what a container or object holds itself; None for what holds nothing to change."""
    if isinstance(value, CONTAINERS):
        return value.copy()
    if isinstance(value, _OPAQUE):
        return None
    if isinstance(value, nn.Module):
        return {key: x for key, x in vars(value).items() if key not in NOT_STATE}
    if type(value).__module__.partition(".")[0] in _FOREIGN:
        return None
    return attributes_of(value) if hasattr(value, "__dict__") or _slots(value) else None


def attributes_of(value: Any) -> dict[str, Any]:
    """A copy of what an object keeps in its dictionary and in slots."""
    slots = {name: getattr(value, name) for name in _slots(value) if hasattr(value, name)}
    return {**getattr(value, "__dict__", {}), **slots}


def _slots(value: Any) -> tuple[str, ...]:
    """The names of what an object keeps beside a dictionary."""
    cls: Any = type(value)
    return _slots_of(cls)


@functools.cache
def _slots_of(cls: Any) -> tuple[str, ...]:
    found: list[str] = []
    for each in cls.__mro__:
        names = vars(each).get("__slots__", ())
        if each.__module__ not in sys.stdlib_module_names:  # paths and numbers keep caches so
            for name in (names,) if isinstance(names, str) else names:
                private = name.startswith("__") and not name.endswith("__")
                found.append(f"_{each.__name__.lstrip('_')}{name}" if private else name)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


def items_of(content: Any) -> Iterator[tuple[Any, Any]]:
    return iter(content.items() if isinstance(content, dict) else enumerate(content))


def _put(value: Any, key: Any, item: Any) -> None:
    if isinstance(value, dict):
        value[key] = item
    elif key in _slots(value):
        object.__setattr__(value, key, item)
    else:
        value.__dict__[key] = item


def _take(value: Any, key: str) -> None:
    if key in _slots(value):
        object.__delattr__(value, key)
    else:
        del value.__dict__[key]


def _same(x: Any, y: Any) -> bool:
    """One object, or equal constants."""
    return x is y or (type(x) is type(y) and isinstance(x, PLAIN) and x == y)


PLAIN = (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


def _spoiled(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(map(_spoiled, value))
    if type(value) is dict:
        return {key: _spoiled(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "fc":
            return np.full_like(value, np.nan)
        return (
            ~value if value.dtype.kind == "b" else value + 1 if value.dtype.kind in "iu" else value
        )
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point() or value.is_complex():
        return torch.full_like(value, torch.nan)
    return ~value if value.dtype == torch.bool else value + 1


def _equal(x: Any, y: Any) -> bool:
    """Equality of what two runs left behind, by value."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        same = x.shape == y.shape and x.dtype == y.dtype
        return same and torch.equal(x.nan_to_num(), y.nan_to_num())
    if type(x) is not type(y):
        return False
    if isinstance(x, np.ndarray):
        same = x.shape == y.shape and x.dtype == y.dtype
        return bool(same and x.tobytes() == y.tobytes())
    if isinstance(x, (list, tuple, deque)):
        return len(x) == len(y) and all(map(_equal, x, y))
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(_equal(x[key], y[key]) for key in x)
    if (content := content_of(x)) is not None:
        return _equal(content, content_of(y))
    return bool(x == y)


def kept_between_calls(
    watch: Watch, first: list[Any], run: Callable[[bool], list[Any]]
) -> tuple[str, ...]:
    """What a module has written at its first call and reads at later ones; empty if nothing.

    A value that each call writes before it is read (the last attention map, for whoever looks) is
    not among it, nor what the first call makes for all others, whatever its inputs are (a table of
    positions).

    Args:
        watch: the module's, taken before its first call.
        first: the outputs of that call.
        run: calls it again, with the same inputs or (True) with others of the same shapes, and
            gives its outputs.
    """
    names = tuple(dict.fromkeys(watch.changed()))
    if not names:
        return ()
    left, second = watch.values(), Watch(watch.roots)
    try:
        if not _equal(run(False), first):
            return names
        if not second.changed():
            watch.restore()
            run(True)
            return () if _equal(watch.values(), left) else names
        again = watch.values()
        if not all(_equal_constants(left.get(x), again.get(x)) for x in left.keys() | again.keys()):
            return names
        watch.spoil()
        return () if _equal(run(False), first) else names
    except Exception:  # whatever the module raises: it has read what was left
        return names


def _equal_constants(x: Any, y: Any) -> bool:
    """Whether what is no tensor is equal: two calls alike leave it so, unless they count."""
    if isinstance(x, (Tensor, np.ndarray)) and type(x) is type(y):
        return True
    if isinstance(x, (list, tuple, deque)) and isinstance(y, (list, tuple, deque)):
        return len(x) == len(y) and all(map(_equal_constants, x, y))
    return _equal(x, y)


def assign(old: Any, new: Any) -> Any:
    """Make ``old``, a container or object of the caller's, what ``new`` is; returns the result.

    What cannot be changed in place (a tensor, a number) is ``new`` itself.
    """
    if old is new or type(old) is not type(new):
        return new
    if isinstance(old, dict):
        merged = {key: assign(old[key], x) if key in old else x for key, x in new.items()}
        old.clear()
        old.update(merged)
        return old
    if isinstance(old, list):
        kept = [assign(*pair) for pair in zip(old, new, strict=False)]
        old[:] = kept + new[len(kept) :]
        return old
    if type(old) is tuple and len(old) == len(new):
        merged_items = tuple(map(assign, old, new))
        return old if all(map(_same, old, merged_items)) else merged_items
    if isinstance(old, (Tensor, nn.Module)) or content_of(old) is None:
        return new
    before, after = content_of(old), content_of(new)
    for key, x in after.items():
        _put(old, key, assign(before[key], x) if key in before else x)
    for key in before.keys() - after.keys():
        _take(old, key)
    return old
