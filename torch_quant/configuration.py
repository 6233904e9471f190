"""A quantizer's configuration as data: JSON and YAML, checked entry by entry."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch_quant import recipes
from torch_quant.backends import Backend
from torch_quant.config import RECIPES, Overrides, QConfig, read_qconfig
from torch_quant.core.documents import (
    Lines,
    Place,
    check_keys,
    check_kind,
    read_json,
    read_yaml,
    shown,
)
from torch_quant.core.naming import class_path, did_you_mean
from torch_quant.errors import InvalidConfig
from torch_quant.graph.dynamic import Dynamic, checked_dynamic
from torch_quant.graph.policy import CapturePolicy, checked_capture
from torch_quant.graph.rules import key_text, rules_of
from torch_quant.io.files import write_atomically
from torch_quant.io.kinds import what_it_holds
from torch_quant.module_filter import read_filter
from torch_quant.settings import Settings
from torch_quant.unseen import checked_choice

__all__ = ["VERSION", "configuration", "read_configuration", "write_configuration"]

VERSION = 1
_KEYS = (
    "version", "backend", "qconfig", "overrides", "module_filter", "unseen_calls", "dynamic",
    "capture",
)  # fmt: skip
_ENDINGS = (".json", ".yaml", ".yml")


def read_configuration(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a :class:`Quantizer` that a file or a mapping holds.

    Args:
        source: the path of a JSON or YAML file, or what such a file would hold.

    Raises:
        InvalidConfig: it cannot be read, or an entry is wrong; says which, in which line, and what
            was expected.

    >>> read_configuration({"backend": "reference", "overrides": {"head": "float"}})["overrides"]
    {'head': None}
    """
    if isinstance(source, Mapping):
        return _arguments(dict(source), Lines("the configuration"))
    path = Path(source)
    if path.suffix not in _ENDINGS:
        hint = what_it_holds(path)
        raise InvalidConfig(f"{path}: expected a file that ends in {', '.join(_ENDINGS)}{hint}")
    try:
        text = path.read_text(encoding="utf-8")
        data, lines = (read_json if path.suffix == ".json" else read_yaml)(text, str(path))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InvalidConfig):
            raise
        raise InvalidConfig(f"cannot read the configuration {path}: {error}") from error
    return _arguments(data, lines)


def _arguments(data: Any, lines: Lines) -> dict[str, Any]:
    check_kind(data, dict, (), "the configuration", lines)
    check_keys(data, (), _KEYS, "the configuration", lines, optional=_KEYS)
    version = data.get("version", VERSION)
    if version != VERSION or type(version) is not int:
        message = f"this has version {shown(version)}; this torch_quant reads {VERSION}"
        raise lines.error(("version",), message)
    found: dict[str, Any] = {}
    for key, read in _READERS.items():
        if data.get(key) is not None:
            found[key] = read(data[key], (key,), f"{key!r}", lines)
    return found


def _placed(place: Place, what: str, lines: Lines, check: Callable[[], Any]) -> Any:
    """What ``check`` returns; what it raises, with the line."""
    try:
        return check()
    except InvalidConfig as error:
        raise lines.error(place, f"{what}: {error}") from error


def _backend(data: Any, place: Place, what: str, lines: Lines) -> Backend:
    name: str = check_kind(data, str, place, what, lines)
    found: Backend = _placed(place, what, lines, lambda: Backend.get(name))
    return found


def _overrides(data: Any, place: Place, what: str, lines: Lines) -> dict[str, QConfig | None]:
    check_kind(data, dict, place, what, lines)
    found: dict[str, QConfig | None] = {}
    for key, value in data.items():
        at, entry = (*place, key), f"override {key!r}"
        if value is None or value == "float":
            found[key] = None
        elif isinstance(value, dict) or (isinstance(value, str) and value in RECIPES):
            found[key] = read_qconfig(value, at, entry, lines)
        else:
            hint = did_you_mean(value, ["float", *RECIPES]) if isinstance(value, str) else ""
            expected = f"an object, the name of a recipe, or null or 'float'{hint}"
            message = f"{entry} is {shown(value)}; expected {expected}"
            raise lines.error(at, message)
        try:
            rules_of({key: None})
        except InvalidConfig as error:
            raise lines.error(at, str(error)) from error
    return found


def _unseen(data: Any, place: Place, what: str, lines: Lines) -> str:
    choice: str = _placed(place, what, lines, lambda: checked_choice(data))
    return choice


def _dynamic(data: Any, place: Place, what: str, lines: Lines) -> Dynamic:
    check_kind(data, dict, place, what, lines)
    found: Dynamic = data
    for name, axes in found.items():
        try:
            checked_dynamic({name: axes})
        except InvalidConfig as error:
            raise lines.error((*place, name), str(error)) from error
    return found


def _capture(data: Any, place: Place, what: str, lines: Lines) -> str | list[str]:
    policy: CapturePolicy = _placed(place, what, lines, lambda: checked_capture(data))
    return policy.data()


_READERS: dict[str, Callable[[Any, Place, str, Lines], Any]] = {
    "backend": _backend,
    "qconfig": read_qconfig,
    "overrides": _overrides,
    "module_filter": read_filter,
    "unseen_calls": _unseen,
    "dynamic": _dynamic,
    "capture": _capture,
}


def configuration(
    backend: Backend | None,
    settings: Settings,
    unseen_calls: str,
    dynamic: Mapping[str, frozenset[int]],
    capture: CapturePolicy | None,
) -> dict[str, Any]:
    """The data from which :func:`read_configuration` makes the same quantizer.

    Args:
        backend: what was asked for, None for the fastest of the machine.
        settings: formats, overrides and filter.
        unseen_calls: as :class:`Quantizer` has it.
        dynamic: the same.
        capture: the same; None where it is left to the formats.

    Raises:
        InvalidConfig: something is an object of Python alone: says what, and what to do.
    """
    data: dict[str, Any] = {"version": VERSION}
    if backend is not None:
        if Backend.get(backend.name) is not backend:
            raise InvalidConfig(
                f"{backend!r} was made with options of its own, which are no data: give the "
                "quantizer a registered backend, or set quantizer.backend after reading"
            )
        data["backend"] = backend.name
    parts = {
        "overrides": _overrides_data(settings.overrides),
        "module_filter": settings.module_filter.to_dict(),
        "dynamic": {name: sorted(axes) for name, axes in dynamic.items()},
    }
    if settings.qconfig != recipes.int8_static():  # the default
        data["qconfig"] = settings.qconfig.to_dict()
    data |= {name: part for name, part in parts.items() if part}
    if unseen_calls != "capture":
        data["unseen_calls"] = unseen_calls
    return data if capture is None else {**data, "capture": capture.data()}


def _overrides_data(overrides: Overrides) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for rule in rules_of(overrides):
        key = rule.key
        if isinstance(key, type):
            text = f"class:{class_path(key)}"
        elif isinstance(key, str):
            text = key
        else:
            raise InvalidConfig(
                f"override {key_text(key)} is a function, which is no data: name what it covers, "
                "or use quantizer.set(function, config) after reading"
            )
        data.pop(text, None)  # a class and its path: the last holds
        try:
            data[text] = None if rule.value is None else rule.value.to_dict()
        except InvalidConfig as error:
            raise InvalidConfig(f"override {key_text(key)}: {error}") from error
    return data


def write_configuration(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write ``data`` as JSON or YAML, by the ending of ``path``.

    Raises:
        InvalidConfig: another ending; the path cannot be written; PyYAML is not installed.
    """
    suffix = Path(path).suffix
    if suffix not in _ENDINGS:
        raise InvalidConfig(f"{path}: expected a file that ends in {', '.join(_ENDINGS)}")
    if suffix == ".json":
        text = json.dumps(data, indent=1) + "\n"
    else:
        try:
            import yaml
        except ImportError as error:
            raise InvalidConfig(
                f"{path}: PyYAML, which writes YAML, is not installed: pip install pyyaml, or give "
                "a path that ends in .json"
            ) from error
        text = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))
