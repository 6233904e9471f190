"""What Python code changes besides its result: attributes of modules, and arguments.

A graph computes outputs from inputs and nothing else. So a module that leaves something for its
next call runs as Python; what a module does to its arguments is done to the caller's afterwards.
"""

from __future__ import annotations

import enum
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torch_quant.errors import CaptureFailed

__all__ = ["KeepsState", "Watch", "assign", "attributes", "kept_between_calls"]

Array = NDArray[Any]
NOT_STATE = frozenset({"_parameters", "_buffers", "_modules", "training"})
"""Entries of a module's dictionary that others look after."""
_CONTAINERS = (dict, list, set, deque)
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
        elif (content := _content(value)) is not None:
            self._saved.append((path, value, content))
            for key, item in _items(content):
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
            now = _content(value)
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

    def changed(self) -> list[str]:
        """The paths of what is not as it was."""
        found = [path for path, _, _ in self._differences()]
        found += [path for path, x, version, _ in self._tensors if x._version != version]
        return found + [path for path, _, _ in self._written()]

    def values(self) -> dict[str, Any]:
        """What stands now in the places that changed."""
        found = {
            path: list(value) if key is None else _content(value).get(key)
            for path, value, key in self._differences()
        }
        written = [(path, x) for path, x, version, _ in self._tensors if x._version != version]
        found |= {path: x.copy() for path, x, _ in self._written()}
        return found | {path: x.clone() for path, x in written}

    def spoil(self) -> None:
        """Write NaN over every tensor in the places that changed, so that reading it shows."""
        for _, value, key in list(self._differences()):
            if key is not None and key in _content(value):
                _put(value, key, _spoiled(_content(value)[key]))
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
                own = {key: x for key, x in vars(value).items() if key in NOT_STATE}
                value.__dict__.clear()
                value.__dict__.update(before | own)
        for _, x, version, saved in self._tensors:
            if x._version != version:
                x.copy_(saved)
        for _, array, before in self._written():
            array[...] = before


def _one(path: str, value: Any, before: Any) -> Watch:
    watch = Watch({})
    watch._saved.append((path, value, before))
    return watch


def _content(value: Any) -> Any:
    """A copy of what a container or object holds itself; None for what holds nothing to change."""
    if isinstance(value, _CONTAINERS):
        return value.copy()
    if isinstance(value, _OPAQUE):
        return None
    if isinstance(value, nn.Module):
        return {key: x for key, x in vars(value).items() if key not in NOT_STATE}
    if type(value).__module__.partition(".")[0] in _FOREIGN:
        return None
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def _items(content: Any) -> Iterator[tuple[Any, Any]]:
    return iter(content.items() if isinstance(content, dict) else enumerate(content))


def _put(value: Any, key: Any, item: Any) -> None:
    if isinstance(value, dict):
        value[key] = item
    else:
        value.__dict__[key] = item


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
    if (content := _content(x)) is not None:
        return _equal(content, _content(y))
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


class _Identity:
    """Equal to itself only: stands for an object whose insides do not count."""

    def __init__(self, value: Any) -> None:
        self.key = id(value)
        self.version = value._version if _has_version(value) else 0
        try:  # what stands for a part of a model must not keep the model alive
            self.get: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self.get = lambda: value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Identity):
            return False
        value = self.get()
        return value is not None and value is other.get() and self.version == other.version

    def __hash__(self) -> int:
        return self.key


def _has_version(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_inference()


def attributes(model: nn.Module) -> dict[str, Any]:
    """What the forward of ``model`` may read beside parameters and buffers.

    Returns:
        ``child.attribute`` -> a fact that compares equal as long as the attribute is the same; and
        ``class of child``.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    seen: dict[int, Any] = {id(x): name for name, x in tensors}  # which others look after
    classes = {f"class of {prefix}": type(each) for prefix, each in model.named_modules() if prefix}
    return classes | {
        f"{prefix}.{name}".strip("."): fact_of(value, seen)
        for prefix, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
        for name, value in vars(module).items()
        if name not in NOT_STATE and not is_empty(name, value)
    }


def is_empty(name: str, value: Any) -> bool:
    """A private container that holds nothing, as PyTorch's own of hooks."""
    return name.startswith("_") and (
        value is None or (isinstance(value, _CONTAINERS) and not value)
    )


def fact_of(value: Any, seen: dict[int, Any], depth: int = 0) -> Any:
    """What compares equal as long as ``value`` is the same; ``seen`` has what was met already."""
    if value is None or isinstance(value, PLAIN):
        return value
    if isinstance(value, nn.Module):
        return id(value)  # others notice that it was replaced
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, types.MethodType):
        return value.__func__
    if isinstance(value, weakref.ReferenceType):
        return "a weak reference"  # an LSTM keeps those of its first parameters
    fact: Any = _Identity(value)
    seen[id(value)] = fact
    if isinstance(value, tuple):
        fact = tuple(fact_of(item, seen, depth + 1) for item in value)
    elif depth < _DEEPEST and (content := _content(value)) is not None:
        items = [(key, fact_of(item, seen, depth + 1)) for key, item in _items(content)]
        fact = (type(value), id(value), items)
    seen[id(value)] = fact
    return fact


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
    if isinstance(old, (Tensor, nn.Module)) or _content(old) is None:
        return new
    for key, x in vars(new).items():
        old.__dict__[key] = assign(old.__dict__[key], x) if key in old.__dict__ else x
    for key in old.__dict__.keys() - vars(new).keys():
        del old.__dict__[key]
    return old
