"""Arguments of operators and constants of calls as JSON."""

from __future__ import annotations

import base64
import math
import operator
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

from torch_quant.errors import InvalidConfig
from torch_quant.ops.functions import DENIED, find_operator, path_of

__all__ = [
    "class_at",
    "decode",
    "encode",
    "entries",
    "operator_at",
    "wrong",
]


def wrong(what: str, found: Any, expected: str) -> InvalidConfig:
    """The error of an entry that is not what was saved."""
    text = repr(found)
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return InvalidConfig(f"{what} is {shown}; expected {expected}: the file was changed")


_NAMES = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
"""Constants of torch that are saved by their names."""


def encode(value: Any, refer: Callable[[Any], Any] = lambda value: None) -> Any:
    """``value`` as JSON.

    Args:
        value: a constant, or a nest of them in lists, tuples, dictionaries and slices.
        refer: gives the JSON for what is no constant (a node), or None.

    Raises:
        InvalidConfig: it holds an object that is no data; says of which class.

    >>> encode((1, float("inf"), torch.float32, slice(0, None)))
    {'tuple': [1, {'float': 'inf'}, {'dtype': 'float32'}, {'slice': [0, None, None]}]}
    """
    reference = refer(value)
    if reference is not None:
        return reference
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is complex:
        return {"complex": [encode(value.real), encode(value.imag)]}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, torch_kind in _NAMES.items():
        if isinstance(value, torch_kind):
            return {name: str(value).removeprefix("torch.")}
    if kind is slice:
        return {"slice": [encode(each, refer) for each in (value.start, value.stop, value.step)]}
    if isinstance(value, list):  # fx keeps lists and dictionaries in classes of its own
        return [encode(each, refer) for each in value]
    if kind in (tuple, torch.Size):
        return {"tuple": [encode(each, refer) for each in value]}
    if isinstance(value, dict):
        pairs = [[encode(key), encode(each, refer)] for key, each in value.items()]
        return {"ordered" if isinstance(value, OrderedDict) else "dict": pairs}
    raise InvalidConfig(
        f"an object of {path_of(kind)} is part of the model's calls or outputs and is no data; "
        "save the quantizer (quantizer.save) and quantize the float model again"
    )


def decode(data: Any, what: str, refer: Callable[[str], Any] | None = None) -> Any:
    """Undo :func:`encode`.

    Args:
        data: JSON.
        what: what it is, for messages.
        refer: finds a node by its name.

    Raises:
        InvalidConfig: it is nothing that :func:`encode` gives.

    >>> decode({"tuple": [1, {"float": "inf"}, {"dtype": "float32"}]}, "an argument")
    (1, inf, torch.float32)
    """
    if data is None or type(data) in (bool, int, float, str):
        return data
    if isinstance(data, list):
        return [decode(each, what, refer) for each in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise wrong(what, data, "a constant")
    ((kind, inner),) = data.items()
    if kind == "node" and refer is not None and isinstance(inner, str):
        return refer(inner)
    if kind == "tuple" and isinstance(inner, list):
        return tuple(decode(each, what, refer) for each in inner)
    if kind in ("dict", "ordered") and isinstance(inner, list):
        pairs = [_pair(each, what) for each in inner]
        found = {decode(key, what): decode(each, what, refer) for key, each in pairs}
        return OrderedDict(found) if kind == "ordered" else found
    if kind == "slice" and isinstance(inner, list) and len(inner) == 3:
        return slice(*(decode(each, what, refer) for each in inner))
    return _scalar(kind, inner, what)


def _pair(data: Any, what: str) -> tuple[Any, Any]:
    if not isinstance(data, list) or len(data) != 2:
        raise wrong(what, data, "a key and a value")
    return data[0], data[1]


def _scalar(kind: str, inner: Any, what: str) -> Any:
    """A constant that JSON has no form for."""
    if kind == "float" and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if kind == "complex" and isinstance(inner, list) and len(inner) == 2:
        real, imaginary = (decode(each, what) for each in inner)
        return complex(real, imaginary)
    if kind in _NAMES and isinstance(inner, str):
        found = getattr(torch, inner, None)
        if isinstance(found, _NAMES[kind]):
            return found
    try:
        if kind == "device" and isinstance(inner, str):
            return torch.device(inner)
        if kind == "bytes" and isinstance(inner, str):
            return base64.b64decode(inner, validate=True)
    except (RuntimeError, ValueError) as error:
        raise wrong(what, inner, f"a {kind}") from error
    raise wrong(what, {kind: inner}, "a constant")


_NAMESPACES = {
    "aten", "higher_order", "mkldnn", "mkldnn_prepacked", "prims", "quantized",
    "quantized_decomposed", "torch_quant",
}  # fmt: skip
"""Where graphs of ours call operators. Those of other libraries must be of tensors alone."""
_OPERATOR = re.compile(r"\w+(\.\w+){2}|higher_order\.[a-z_]+")


def operator_at(name: Any, what: str) -> Any:
    """The operator of that name, ``aten.add.Tensor``.

    Raises:
        InvalidConfig: there is none in this process, or it may do more than compute.
    """
    if not isinstance(name, str) or not _OPERATOR.fullmatch(name):
        raise wrong(what, name, "an operator")
    try:
        found = find_operator(name)
    except (AttributeError, RuntimeError) as error:
        raise InvalidConfig(
            f"{what} is {name}, which torch {torch.__version__} does not have: load the file with "
            "the version that wrote it, after importing the library that the operator is of"
        ) from error
    if not isinstance(found, OpOverload | HigherOrderOperator) or not _computes(name, found):
        raise InvalidConfig(f"{what} is {name}, which no saved model may call")
    return found


def _computes(name: str, found: Any) -> bool:
    """Whether an operator does nothing but compute tensors from tensors."""
    namespace, packet, *_ = name.split(".")
    if namespace in _NAMESPACES:
        return packet not in DENIED
    arguments = [str(each.type) for each in found._schema.arguments]
    return "Tensor" in arguments and not any("str" in each for each in arguments)


def class_at(path: Any, what: str) -> type:
    """The class at a path, in a module that is imported already.

    Raises:
        InvalidConfig: there is none; says what to import.
    """
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
        raise wrong(what, path, "a class")
    parts = path.split(".")
    for n in range(len(parts) - 1, 0, -1):
        module: Any = sys.modules.get(".".join(parts[:n]))
        if module is not None:
            try:
                found = operator.attrgetter(".".join(parts[n:]))(module)
            except AttributeError:
                continue
            if isinstance(found, type):
                return found
    raise InvalidConfig(
        f"{what} is of the class {path}, which is not imported: import the module that has it, "
        "then load again (a saved model imports nothing)"
    )


def entries(data: Any, what: str, *names: str) -> Mapping[str, Any]:
    """``data`` if it is an object with exactly these entries; raises :class:`InvalidConfig`."""
    if not isinstance(data, dict) or set(data) != set(names):
        raise wrong(what, data, f"an object with {', '.join(names)}")
    return data
