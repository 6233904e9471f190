"""Files that people write, JSON and YAML: read with the line of every entry, for messages."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch_quant.core.naming import did_you_mean
from torch_quant.errors import InvalidConfig

__all__ = ["Lines", "Place", "check_keys", "check_kind", "read_json", "read_yaml", "shown"]

Place = tuple[str | int, ...]
"""Keys and indices that lead to an entry of the file."""


class Lines:
    """The line of every entry of a file, for messages.

    Args:
        source: the file's name.
        lines: entry -> its line.
    """

    def __init__(self, source: str = "", lines: Mapping[Place, int] | None = None) -> None:
        self.source, self._lines = source, dict(lines or {})

    def error(self, place: Place, message: str) -> InvalidConfig:
        """The error of an entry, with its line, or that of what should hold it."""
        known = next((place[:n] for n in range(len(place), -1, -1) if place[:n] in self._lines), ())
        at = f", line {self._lines[known]}" if known in self._lines else ""
        return InvalidConfig(f"{self.source}{at}: {message}")


class _Reader:
    """Reads JSON that is known to be valid, noting where entries stand."""

    _space = re.compile(r"\s*")

    def __init__(self, text: str, source: str) -> None:
        self.text, self.lines = text, dict[Place, int]()
        self._ends = [match.start() for match in re.finditer("\n", text)]
        self._source, self._scalar = source, json.JSONDecoder().raw_decode

    def _skip(self, at: int) -> int:
        found = self._space.match(self.text, at)
        return found.end() if found else at

    def read(self, at: int = 0, place: Place = ()) -> tuple[Any, int]:
        """The value at ``at``, and where it ends."""
        at = self._skip(at)
        self.lines[place] = bisect.bisect(self._ends, at) + 1
        if self.text[at] == "{":
            return self._object(self._skip(at + 1), place)
        if self.text[at] == "[":
            return self._array(self._skip(at + 1), place)
        return self._scalar(self.text, at)

    def _object(self, at: int, place: Place) -> tuple[Any, int]:
        found: dict[str, Any] = {}
        while self.text[at] != "}":
            if self.text[at] == ",":
                at = self._skip(at + 1)
            key, end = self._scalar(self.text, at)
            entry = (*place, key)
            if key in found:
                self.lines[entry] = bisect.bisect(self._ends, at) + 1
                where = Lines(self._source, self.lines)
                raise where.error(entry, f"{key!r} is given twice")
            found[key], at = self.read(self._skip(end) + 1, entry)
            at = self._skip(at)
        return found, at + 1

    def _array(self, at: int, place: Place) -> tuple[Any, int]:
        found: list[Any] = []
        while self.text[at] != "]":
            if self.text[at] == ",":
                at = self._skip(at + 1)
            value, at = self.read(at, (*place, len(found)))
            found.append(value)
            at = self._skip(at)
        return found, at + 1


def read_json(text: str, source: str) -> tuple[Any, Lines]:
    """A JSON text and the lines of its entries.

    Raises:
        ValueError: it is no JSON.
        InvalidConfig: a key is given twice.
    """
    json.loads(text)
    reader = _Reader(text, source)
    return reader.read()[0], Lines(source, reader.lines)


_MOST_NODES = 100_000
"""More than anybody writes; a few lines of YAML that refer to each other can stand for billions."""


def read_yaml(text: str, source: str) -> tuple[Any, Lines]:
    """A YAML text and the lines of its entries. It holds plain values: no tag makes an object.

    Raises:
        InvalidConfig: PyYAML is not installed; it is no YAML; a key is given twice or is no string;
            it holds a tag, or refers to itself.
    """
    try:
        import yaml
    except ImportError as error:
        raise InvalidConfig(
            f"{source}: PyYAML, which reads YAML, is not installed: pip install pyyaml, or write "
            "the same as JSON"
        ) from error
    loader = yaml.SafeLoader(text)
    reader = _YamlReader(loader, source)
    try:
        node = loader.get_single_node()
        value = None if node is None else reader.value(node, (), ())
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, InvalidConfig):
            raise
        mark = getattr(error, "problem_mark", None)
        where: dict[Place, int] = {} if mark is None else {(): mark.line + 1}
        message = getattr(error, "problem", None) or str(error)
        raise Lines(source, where).error((), f"this is no plain YAML: {message}") from error
    finally:
        loader.dispose()
    return value, reader.where


class _YamlReader:
    """Plain values of YAML nodes, noting where entries stand."""

    def __init__(self, loader: Any, source: str) -> None:
        self._loader, self._source = loader, source
        self._lines: dict[Place, int] = {}
        self._merged: set[int] = set()
        self._count = 0

    @property
    def where(self) -> Lines:
        return Lines(self._source, self._lines)

    def value(self, node: Any, place: Place, inside: tuple[int, ...]) -> Any:
        """The value of ``node``, which stands at ``place`` in the nodes ``inside``."""
        self._lines.setdefault(place, node.start_mark.line + 1)
        self._count += 1
        if id(node) in inside or self._count > _MOST_NODES:
            raise self.where.error(place, "this refers to itself, or repeats itself without end")
        inside = (*inside, id(node))
        if node.id == "scalar":
            try:
                return self._loader.construct_object(node)
            except ValueError as error:  # a date that is none
                message = f"{node.value!r} is no plain value: {error}; write it in quotes"
                raise self.where.error(place, message) from error
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise self.where.error(place, f"the tag {node.tag!r} is not allowed here")
        if node.id == "sequence":
            return [self.value(each, (*place, i), inside) for i, each in enumerate(node.value)]
        self._merge(node, place)
        found = {}
        for name, each in node.value:
            key = self._key(name, place)
            entry: Place = (*place, key)
            self._lines[entry] = name.start_mark.line + 1
            found[key] = self.value(each, entry, inside)
        return found

    def _key(self, node: Any, place: Place) -> str:
        key = self._loader.construct_object(node) if node.id == "scalar" else node.id
        if not isinstance(key, str) or node.id != "scalar":
            message = f"the key {key!r} is no string; write {str(key)!r}, in quotes"
            raise self._wrong_key(node, place, str(key), message)
        return key

    def _wrong_key(self, node: Any, place: Place, key: str, message: str) -> InvalidConfig:
        entry: Place = (*place, key)
        self._lines[entry] = node.start_mark.line + 1
        return self.where.error(entry, message)

    def _merge(self, node: Any, place: Place) -> None:
        """Put in what ``<<`` refers to; an own key that is there already is a mistake."""
        if id(node) in self._merged:
            return
        self._merged.add(id(node))
        seen: set[str] = set()
        for name, _ in node.value:
            if name.tag.endswith(":merge"):
                continue
            key = self._key(name, place)
            if key in seen:
                raise self._wrong_key(name, place, key, f"{key!r} is given twice")
            seen.add(key)
        self._loader.flatten_mapping(node)


def check_keys(
    data: Mapping[str, Any], place: Place, allowed: Iterable[str], what: str, lines: Lines,
    optional: Iterable[str] = (),
) -> None:  # fmt: skip
    """Raise :class:`InvalidConfig` for an entry that is not allowed, or one that is missing."""
    allowed = tuple(allowed)
    for key in data:
        if key not in allowed:
            hint = did_you_mean(key, allowed) if isinstance(key, str) else ""
            message = f"{what} has {key!r}; expected {', '.join(allowed)}{hint}"
            raise lines.error((*place, key), message)
    for key in allowed:
        if key not in data and key not in optional:
            raise lines.error(place, f"{what} lacks {key!r}")


def check_kind(value: Any, kind: type, place: Place, what: str, lines: Lines) -> Any:
    """``value``; raises :class:`InvalidConfig` unless it is of that kind."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    if not isinstance(value, kind):
        raise lines.error(place, f"{what} is {shown(value)}; expected {names[kind]}")
    return value


def shown(value: Any) -> str:
    """A value as it stands in a file, cut short."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):  # a date of YAML, an object of Python
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
