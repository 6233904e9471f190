"""What an extension registers is gone after its test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch_quant.backends import base
from torch_quant.config import RECIPES
from torch_quant.core.elements import ELEMENT_TYPES
from torch_quant.core.methods import TRANSFORMS, WEIGHT_METHODS
from torch_quant.ops import table as ops
from torch_quant.statistics import OBSERVERS, STATISTICS

__all__ = ["kept_registries"]


@contextlib.contextmanager
def kept_registries() -> Iterator[None]:
    """Every registry is afterwards as it was before."""
    tables: tuple[dict[Any, Any], ...] = (
        ops.OPERATORS, ops._BY_TARGET, base._REGISTRY, base._REGISTERED, OBSERVERS, STATISTICS,
        WEIGHT_METHODS, TRANSFORMS, ELEMENT_TYPES, RECIPES,
    )  # fmt: skip
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, kept in zip(tables, before, strict=True):
            table.clear()
            table.update(kept)
