"""Nested dictionaries with tensors in them, as JSON and a flat dictionary of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torch_quant.io.data.values import decode, encode

__all__ = ["joined", "parted"]


def parted(value: Any, tensors: dict[str, Tensor], path: tuple[str, ...] = ()) -> Any:
    """``value`` as JSON; its tensors go into ``tensors``, by where they stand.

    Args:
        value: nested mappings with names as keys; tensors and plain values in them.
        tensors: filled.
        path: where ``value`` stands.
    """
    if isinstance(value, Mapping):
        return {
            "entries": {
                key: parted(each, tensors, (*path, str(key))) for key, each in value.items()
            }
        }
    if isinstance(value, Tensor):
        tensors["/".join(path)] = value
        return {"tensor": "/".join(path)}
    return {"value": encode(value)}


def joined(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :func:`parted`."""
    ((kind, inner),) = data.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "value":
        return decode(inner, "the state")
    return {key: joined(each, tensors) for key, each in inner.items()}
