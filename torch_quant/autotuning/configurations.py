"""Configurations as the user gives them, by name and as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch_quant.config import QConfig
from torch_quant.errors import InvalidConfig
from torch_quant.quantizer import Quantizer

__all__ = ["named_configurations"]


def named_configurations(
    given: Mapping[str, Any] | Iterable[Any], backend: str | None
) -> dict[str, dict[str, Any]]:
    """Name -> what :meth:`Quantizer.from_config` takes.

    Args:
        given: each the name of a recipe, a :class:`QConfig`, a quantizer's configuration, or a
            :class:`Quantizer`, whose settings count.
        backend: of those that name none; None for the best of this machine.

    Raises:
        InvalidConfig: one is wrong, or there is none, or two are the same.

    >>> from torch_quant.recipes import weight_only
    >>> some = ["fast", weight_only(bits=3), {"qconfig": {"recipe": "float8"}}]
    >>> list(named_configurations(some, "reference"))
    ['fast', 'configuration 2', 'float8']
    """
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, (str, QConfig, Quantizer)) or not isinstance(given, Iterable):
        raise InvalidConfig(
            f"configurations={given!r}: expected a list of several, or a dict by names"
        )
    else:
        pairs = [(_name(each, number), each) for number, each in enumerate(given, 1)]
    found: dict[str, dict[str, Any]] = {}
    for name, each in pairs:
        if not isinstance(name, str) or name in found:
            raise InvalidConfig(
                f"configurations: {name!r} stands twice, or is no name; name them in a dict"
            )
        made = _data(name, each, backend)
        same = [other for other, data in found.items() if data == made]
        if same:
            raise InvalidConfig(f"configurations: {name!r} is the same as {same[0]!r}")
        found[name] = made
    if not found:
        raise InvalidConfig("configurations is empty: give recipes or configurations")
    return found


def _name(each: Any, number: int) -> str:
    if isinstance(each, str):
        return each
    if isinstance(each, Mapping):
        qconfig = each.get("qconfig")
        recipe = qconfig.get("recipe") if isinstance(qconfig, Mapping) else qconfig
        options = len(qconfig) > 1 if isinstance(qconfig, Mapping) else False
        if isinstance(recipe, str) and not options and set(each) <= {"qconfig", "version"}:
            return recipe
    return f"configuration {number}"


def _data(name: str, each: Any, backend: str | None) -> dict[str, Any]:
    try:
        if isinstance(each, Quantizer):
            return each.to_config()
        if isinstance(each, QConfig):
            return Quantizer(backend, qconfig=each).to_config()
        if isinstance(each, str):
            return Quantizer(backend, qconfig=QConfig.from_dict({"recipe": each})).to_config()
        if isinstance(each, Mapping):
            whole = each if "backend" in each or backend is None else {"backend": backend, **each}
            return Quantizer.from_config(whole).to_config()
    except InvalidConfig as error:
        raise InvalidConfig(f"configurations[{name!r}]: {error}") from error
    raise InvalidConfig(
        f"configurations[{name!r}] is {each!r}: expected the name of a recipe, a QConfig, a "
        "quantizer's configuration as a dict, or a Quantizer"
    )
