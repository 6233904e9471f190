"""Attributes that hold tensors in lists, tuples and dictionaries, as LSTMs hold their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torch_quant.errors import InvalidConfig
from torch_quant.io.data.values import decode, encode, wrong
from torch_quant.ops.functions import path_of

__all__ = ["read_nest", "write_nest"]

_KINDS = ("tensor", "parameter")


def write_nest(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """An attribute as JSON, which refers to its tensors by number.

    Args:
        value: the attribute: lists, tuples and dictionaries of tensors and constants.
        where: its path in the model.
        tensors: gets the tensors, as ``where.0`` and so on.

    Raises:
        InvalidConfig: it holds another object.
    """
    count = 0

    def refer(x: Any) -> Any:
        nonlocal count
        if not isinstance(x, Tensor):
            return None
        tensors[f"{where}.{count}"] = x
        count += 1
        return {"node": f"{_KINDS[isinstance(x, nn.Parameter)]}.{count - 1}"}

    try:
        return encode(value, refer)
    except InvalidConfig as error:
        raise InvalidConfig(
            f"the attribute {where}, of {path_of(type(value))}, holds tensors beside what is no "
            f"data: {error}"
        ) from error


def read_nest(data: Any, where: str, tensor: Callable[[str, bool], Tensor]) -> Any:
    """Undo :func:`write_nest`.

    Args:
        data: JSON.
        where: the attribute's path.
        tensor: the saved tensor of a name, as a parameter or not.

    Raises:
        InvalidConfig: the data are wrong.
    """

    def refer(name: str) -> Tensor:
        kind, _, number = name.partition(".")
        if kind not in _KINDS or not number.isdecimal():
            raise wrong(f"a tensor of {where}", name, "the number of a saved tensor")
        return tensor(f"{where}.{number}", kind == "parameter")

    return decode(data, where, refer)
