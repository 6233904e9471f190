"""Every public function and method shows how it is used, in a doctest that runs."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import torch_quant


def public() -> Iterator[tuple[str, Any]]:
    """Every function of ``torch_quant.__all__`` and every public method of its classes.

    What overrides a method is shown by that, and what is abstract by the examples of its class.
    """
    for name in torch_quant.__all__:
        value = getattr(torch_quant, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            yield from _methods(name, value)


def _methods(name: str, cls: type) -> Iterator[tuple[str, Any]]:
    owners = [each for each in cls.__mro__ if each.__module__.startswith("torch_quant")]
    found = {}
    for owner in owners:  # the first that declares a method comes last
        for method, raw in vars(owner).items():
            function = getattr(raw, "__func__", raw)
            if not method.startswith("_") and inspect.isfunction(function):
                abstract = getattr(function, "__isabstractmethod__", False)
                shown = ">>>" in (function.__doc__ or "")
                if method not in found or shown or abstract:
                    found[method] = owner if abstract and not shown else function
    for method, holder in found.items():
        yield f"{name}.{method}", holder


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


def test_the_reference_has_what_a_quantizer_returns() -> None:
    pages = (Path(__file__).parents[1] / "docs" / "api").glob("*.md")
    listed = {name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)}
    for name, method in _methods("Quantizer", torch_quant.Quantizer):
        returned = inspect.signature(inspect.unwrap(method)).return_annotation
        module = importlib.import_module(method.__module__)
        kind = getattr(module, str(returned), None)
        if inspect.isclass(kind) and kind.__module__.startswith("torch_quant."):
            assert f"{kind.__module__}.{kind.__qualname__}" in listed, f"{name} -> {returned}"
