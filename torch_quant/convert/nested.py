"""Tensors that containers and objects hold, and copies of those with other tensors.

What is looked into: lists, tuples, dictionaries, deques and their subclasses, bound methods, and
objects that keep attributes in a dictionary or in slots, up to 12 deep. Sets, keys, closures and
the objects of other libraries (as :func:`content_of` knows them) are not.
"""

from __future__ import annotations

import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from torch_quant.graph.effects import PLAIN, attributes_of, content_of

__all__ = ["Replaced", "tensors_in"]

_BASES: tuple[Any, ...] = (OrderedDict, defaultdict, dict, list, tuple, deque)
"""Kinds of containers, special ones first."""
_OWN_COPY = ("__copy__", "__deepcopy__", "__del__")
"""Methods of a class by which a second object of it may be another matter than the first."""
_DEEPEST = 12
_Made = dict[int, tuple[Any, Any]]
"""id -> what has it, which is kept so that nothing else gets the id, and its copy."""


def tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that ``value`` leads to, without those of modules.

    Args:
        value: whatever an attribute may be.
        seen: ids of what was looked into; gets those of what is.

    >>> import torch
    >>> nest = {"all": [torch.ones(2)]}
    >>> nest["itself"] = nest
    >>> list(tensors_in(nest, set()))
    [tensor([1., 1.])]
    """
    if isinstance(value, Tensor):
        yield value
    for _, part in _reached(value, seen):
        if isinstance(part, Tensor):
            yield part


class Replaced:
    """Values with other tensors in the place of theirs; what holds none is left as it is.

    Each container and object has one copy, however often it is met, and may lead to itself. An
    object stays the one it is where no second one is to be made: it leads to a module, its class
    says how it is copied or has ``__del__``, or it is made by C code.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> replaced = Replaced()
    >>> held = SimpleNamespace(scale=torch.ones(2), name="a word")
    >>> new = replaced(held, lambda x: x * 2)
    >>> new
    namespace(scale=tensor([2., 2.]), name='a word')
    >>> held.scale, replaced([held], lambda x: x * 2)[0] is new
    (tensor([1., 1.]), True)
    """

    def __init__(self) -> None:
        self._made: _Made = {}

    def __call__(self, value: Any, tensor: Callable[[Tensor], Tensor]) -> Any:
        """A copy of ``value``, or the very same.

        Args:
            value: whatever an attribute may be.
            tensor: another for a tensor, or the very same; the same at each call.
        """
        if isinstance(value, Tensor):
            return tensor(value)
        if value is None or isinstance(value, PLAIN):
            return value
        if id(value) not in self._made:
            result = _Copying(value, tensor, self._made).run()
            self._made.setdefault(id(value), (value, result))
        return self._made[id(value)][1]


class _Copying:
    """One value of :class:`Replaced`.

    Args:
        value: to copy.
        tensor: another for a tensor.
        made: what was copied, or left as it is, before; gets what is now.
    """

    def __init__(self, value: Any, tensor: Callable[[Tensor], Tensor], made: _Made) -> None:
        self.value, self.tensor, self.made = value, tensor, made
        self.parts: dict[int, Any] = {id(value): value}
        self.holders: dict[int, list[int]] = {}
        for holder, part in _reached(value, set(), made):
            self.parts[id(part)] = part
            self.holders.setdefault(id(part), []).append(id(holder))
        modules = [number for number, x in self.parts.items() if isinstance(x, nn.Module)]
        self.with_modules = _above(modules, self.holders)
        self.late: set[int] = set()
        """What can only be made when there are copies of its parts."""
        self.copies: list[tuple[Any, Any]] = []

    def run(self) -> Any:
        changed = [number for number, x in self.parts.items() if self._is_another(x)]
        _above(changed, self.holders, self._begin)
        for old, new in self.copies:
            _fill(new, old, self._copy_of)
        return self._copy_of(self.value)

    def _is_another(self, part: Any) -> bool:
        if isinstance(part, Tensor):
            return self.tensor(part) is not part
        return id(part) in self.made and self.made[id(part)][1] is not part

    def _begin(self, number: int) -> bool:
        """Begin with the copy of a holder; False where there is to be none."""
        x = self.parts[number]
        if _base(x) is None and not isinstance(x, types.MethodType) and number in self.with_modules:
            return False
        if not _can_be_made(x):
            return False
        if isinstance(x, (types.MethodType, tuple)):
            self.late.add(number)
        else:
            self.made[number] = x, _blank(x)
            self.copies.append(self.made[number])
        return True

    def _copy_of(self, part: Any) -> Any:
        if isinstance(part, Tensor):
            return self.tensor(part)
        if id(part) in self.late and id(part) not in self.made:
            new = _late(part, self._copy_of)
            self.made.setdefault(id(part), (part, new))  # it may have been met inside of itself
        return self.made.get(id(part), (None, part))[1]


def _above(
    numbers: Iterable[int],
    holders: dict[int, list[int]],
    enter: Callable[[int], bool] = lambda number: True,
) -> set[int]:
    """What holds some parts, by way of others too, as far as ``enter`` says."""
    found: set[int] = set()
    refused: set[int] = set()
    waiting = list(numbers)
    while waiting:
        for holder in holders.get(waiting.pop(), ()):
            if holder not in found and holder not in refused:
                (found if enter(holder) else refused).add(holder)
                if holder in found:
                    waiting.append(holder)
    return found


def _reached(value: Any, seen: set[int], known: Container[int] = ()) -> Iterator[tuple[Any, Any]]:
    """(holder, part) of everything that a value leads to.

    What was seen, or is known, occurs as a part, and is not looked into.
    """
    level = [value]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for holder in level:
            if id(holder) in seen or id(holder) in known:
                continue
            seen.add(id(holder))
            for part in _parts(holder):
                if part is not None and not isinstance(part, PLAIN):
                    yield holder, part
                    below.append(part)
        level = below


def _parts(x: Any) -> list[Any]:
    """What a container, an object or a bound method holds itself."""
    if isinstance(x, (Tensor, nn.Module)):
        return []
    if isinstance(x, types.MethodType):
        return [x.__self__]
    base = _base(x)
    if base is None:
        ours = type(x).__module__.startswith("torch_quant.")
        return [] if ours or not isinstance(content := content_of(x), dict) else [*content.values()]
    items = dict(base.items(x)).values() if issubclass(base, dict) else base.__iter__(x)
    attributes = () if _is_its_own_dictionary(x) else attributes_of(x).values()
    return [*items, *attributes]


def _base(x: Any) -> Any:
    """The kind of container that ``x`` is; None if it is another object."""
    return next((base for base in _BASES if issubclass(type(x), base)), None)


def _is_its_own_dictionary(x: Any) -> bool:
    """As dictionaries are whose entries are attributes too."""
    return getattr(x, "__dict__", None) is x


def _can_be_made(x: Any) -> bool:
    if isinstance(x, types.MethodType):
        return True
    own = type(x).__mro__[: type(x).__mro__.index(_base(x) or object)]
    if any(name in vars(each) for each in own for name in _OWN_COPY):
        return False
    try:
        _blank(x)
    except TypeError:  # its memory is laid out by C code
        return False
    return True


def _blank(x: Any) -> Any:
    """An empty object of the class of ``x``, of which no code has run."""
    if isinstance(x, types.SimpleNamespace):
        return types.SimpleNamespace.__new__(type(x))
    base = _base(x)
    new = (base or object).__new__(type(x))
    if base is defaultdict:
        defaultdict.__init__(new, x.default_factory)
    elif base is deque:
        deque.__init__(new, (), x.maxlen)
    return new


def _late(x: Any, get: Callable[[Any], Any]) -> Any:
    """A copy of what cannot be filled later: its parts come first."""
    if isinstance(x, types.MethodType):
        return types.MethodType(x.__func__, get(x.__self__))
    new = tuple.__new__(type(x), [get(item) for item in tuple.__iter__(x)])
    _set_attributes(new, x, get)
    return new


def _fill(new: Any, x: Any, get: Callable[[Any], Any]) -> None:
    base = _base(x)
    if base is not None and issubclass(base, dict):
        for key, item in base.items(x):
            base.__setitem__(new, key, get(item))
    elif base is not None:
        base.extend(new, [get(item) for item in base.__iter__(x)])
    if _is_its_own_dictionary(x):
        new.__dict__ = new
    else:
        _set_attributes(new, x, get)


def _set_attributes(new: Any, x: Any, get: Callable[[Any], Any]) -> None:
    own = getattr(x, "__dict__", {})
    for name, value in attributes_of(x).items():
        if name in own:
            vars(new)[name] = get(value)
        else:
            object.__setattr__(new, name, get(value))
