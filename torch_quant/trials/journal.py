"""A file of what was measured, line by line, so that a run that was interrupted goes on from it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant.core.rounded import checksum
from torch_quant.errors import InvalidConfig
from torch_quant.io.files import checked_target
from torch_quant.state import weight_checksums
from torch_quant.version import __version__

__all__ = ["Journal", "described", "key_of"]

_FLOAT = "float32"


def key_of(configuration: Mapping[str, Any] | None) -> str:
    """A configuration as text; ``"float32"`` for none.

    >>> key_of({"b": 1, "a": 2})
    '{"a": 2, "b": 1}'
    """
    return _FLOAT if configuration is None else json.dumps(configuration, sort_keys=True)


class Journal:
    """JSON lines: what the run is of, and then what was found of each configuration.

    Args:
        path: the file; None to keep nothing.
        search: what writes it, by its name, for messages.
        model: the float model.
        eval_fn: known by its name alone.
        rest: gives what else the run is of, as plain values by what it is; called where there is a
            file.

    Raises:
        InvalidConfig: the file is of another model, another ``eval_fn`` or another of ``rest``, or
            no such file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        search: str,
        model: nn.Module,
        eval_fn: Callable[..., Any],
        rest: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.path = None if path is None else checked_target(path, "trials.jsonl")
        self.search = search
        self.found: dict[str, dict[str, Any]] = {}
        """Key -> what is known of it."""
        if self.path is None:
            return
        head = {
            "torch_quant": __version__,
            "model": _checksum([weight_checksums(model), repr(model)]),
            **{name: _checksum(each) for name, each in rest().items()},
            "eval_fn": _name(eval_fn),
        }
        if self.path.exists() and b"\n" in self.path.read_bytes():
            self._read(self.path, head)
        else:  # none, or one that broke off in its first line
            self.path.unlink(missing_ok=True)
            self._write(head)

    def _read(self, path: Path, head: Mapping[str, Any]) -> None:
        *whole, torn = path.read_bytes().split(b"\n")
        try:
            entries = [json.loads(line) for line in whole]
            first, *rest = entries
            known = {name: first[name] for name in head}
            for each in rest:
                self._add(each.pop("of"), each)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidConfig(
                f"{path} is no log of {self.search}; give another file, or remove it"
            ) from error
        other = [name for name in head if known[name] != head[name]]
        if other:
            raise InvalidConfig(
                f"{path} is the log of a run with another {' and another '.join(other)}; give "
                "another file, or remove it"
            )
        if torn:  # the run before was killed while it wrote
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - len(torn))

    def note(self, key: str, facts: Mapping[str, Any]) -> None:
        """Write what was found of a trial."""
        self._add(key, facts)
        self._write({"of": key, **facts})

    def _add(self, key: str, facts: Mapping[str, Any]) -> None:
        known = self.found.setdefault(key, {})
        if "sqnr" in facts:
            known.pop("why_not", None)  # it runs by now
        known.update(facts)

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _name(function: Callable[..., Any]) -> str:
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def described(batch: Any) -> list[Any]:
    """What a batch holds, for JSON: tensors and arrays by their values, other objects by class.

    >>> described({"a": 1}) == described({"b": 1})
    False
    """
    leaves, structure = pytree.tree_flatten(batch)
    found: list[Any] = [str(structure)]
    for x in leaves:
        if isinstance(x, Mapping):  # of a class that pytree doesn't know, as tokenizers give
            found.append({str(name): described(each) for name, each in x.items()})
        elif isinstance(x, Tensor):
            found.append([str(x.dtype), list(x.shape), checksum(x)])
        elif isinstance(x, np.ndarray):
            found.append([str(x.dtype), list(x.shape), zlib.crc32(x.tobytes())])
        else:
            plain = isinstance(x, (str, int, float, bool, type(None)))
            found.append([type(x).__name__, repr(x) if plain else ""])
    return found


def _checksum(data: Any) -> int:
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())
