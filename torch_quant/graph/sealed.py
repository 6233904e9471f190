"""Constants that say whether anybody reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["ConstantRead", "sealed_constant", "sealed_position"]


class ConstantRead(RuntimeError):
    """Code reads the value of a constant that was sealed."""


class _Sealed:
    """Knows its type and raises whenever its value is asked for.

    It is no instance of that type, so code in C that wants one refuses it. Only ``is`` and
    ``type()`` tell the two apart without being noticed.
    """

    def __init__(self, kind: type, position: int, read: Callable[[], Any]) -> None:
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_position", position)
        object.__setattr__(self, "_read", read)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return object.__getattribute__(self, "_kind")
        _refuse(self)


def _refuse(sealed: _Sealed, *args: Any, **kwargs: Any) -> NoReturn:
    object.__getattribute__(sealed, "_read")()
    raise ConstantRead("the value of a constant is read")


_KEPT = {"__class__", "__getattribute__", "__init__", "__init_subclass__", "__new__", "__doc__"}
_BINARY = (
    "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow", "lshift",
    "rshift", "and", "xor", "or",
)  # fmt: skip
_UNARY = (
    "bool", "int", "float", "complex", "index", "neg", "pos", "abs", "invert", "iter", "next",
    "call", "fspath", "enter", "exit", "reversed", "setitem", "delitem", "copy", "deepcopy",
)  # fmt: skip
_METHODS = {name for kind in (str, bytes, object) for name in dir(kind) if name.endswith("__")}
_METHODS |= {f"__{side}{name}__" for name in _BINARY for side in ("", "r", "i")}
_METHODS |= {f"__{name}__" for name in _UNARY}
for _name in _METHODS - _KEPT:
    setattr(_Sealed, _name, _refuse)


def sealed_constant(value: Any, position: int, read: Callable[[], Any]) -> Any:
    """An object in the place of ``value``.

    Args:
        value: a constant.
        position: of it among the leaves of its call.
        read: called when code asks for its value; then :class:`ConstantRead` is raised.
    """
    return _Sealed(type(value), position, read)


def sealed_position(value: Any) -> int | None:
    """The position of the constant that ``value`` stands for, None if it is no such object."""
    return object.__getattribute__(value, "_position") if type(value) is _Sealed else None
