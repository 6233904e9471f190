"""Every public function and method shows how it is used, in a doctest that runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

import torch_quant

INHERITED = {"__init__"}


def public() -> Iterator[tuple[str, Any]]:
    """Every function of ``torch_quant.__all__`` and every public method of its classes."""
    for name in torch_quant.__all__:
        value = getattr(torch_quant, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            for owner in value.__mro__:
                if not owner.__module__.startswith("torch_quant"):
                    continue
                for method, raw in vars(owner).items():
                    function = getattr(raw, "__func__", raw)
                    if not method.startswith("_") and inspect.isfunction(function):
                        yield f"{name}.{method}", function


PUBLIC = dict(public())


def test_the_walk_finds_methods_of_all_kinds() -> None:
    assert {"Quantizer.calib", "Quantizer.from_config", "Backend.get", "QConfig.to_dict"} <= (
        set(PUBLIC)
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_a_doctest_on_every_public_method(name: str) -> None:
    doc = inspect.getdoc(PUBLIC[name])
    assert doc, f"{name} has no docstring"
    assert ">>>" in doc, f"{name} shows no example"
