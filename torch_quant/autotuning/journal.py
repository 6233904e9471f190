"""A file of what was measured, line by line, so that a run that was interrupted goes on from it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant.core.rounded import checksum
from torch_quant.errors import InvalidConfig
from torch_quant.io.files import checked_target
from torch_quant.state import weight_checksums
from torch_quant.version import __version__

__all__ = ["Journal", "key_of"]

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
        model: the float model.
        batches: the data.

    Raises:
        InvalidConfig: the file is of another model or other data, or no such file.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, model: nn.Module, batches: Sequence[Any]
    ) -> None:
        self.path = None if path is None else checked_target(path, "trials.jsonl")
        self.found: dict[str, dict[str, Any]] = {}
        if self.path is None:
            return
        head = {
            "torch_quant": __version__,
            "model": _checksum(weight_checksums(model)),
            "data": _checksum([_described(each) for each in batches]),
        }
        if self.path.exists() and self.path.stat().st_size:
            self._read(self.path, head)
        else:
            self._write(head)

    def _read(self, path: Path, head: Mapping[str, Any]) -> None:
        lines = path.read_text(encoding="utf-8").split("\n")
        whole, torn = lines[:-1], lines[-1]
        try:
            entries = [json.loads(line) for line in whole]
            first, *rest = entries
            known = {name: first[name] for name in head}
            for each in rest:
                self.found.setdefault(each.pop("of"), {}).update(each)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidConfig(
                f"{path} is no log of autotune; give another file, or remove it"
            ) from error
        other = [name for name in head if known[name] != head[name]]
        if other:
            raise InvalidConfig(
                f"{path} is the log of a run with another {' and another '.join(other)}; give "
                "another file, or remove it"
            )
        if torn:  # the run before was killed while it wrote
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - len(torn.encode()))

    def note(self, key: str, facts: Mapping[str, Any]) -> None:
        """Write what was found of a configuration."""
        self.found.setdefault(key, {}).update(facts)
        self._write({"of": key, **facts})

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _described(batch: Any) -> list[Any]:
    return [
        [list(x.shape), checksum(x)] if isinstance(x, Tensor) else str(x)
        for x in pytree.tree_leaves(batch)
    ]


def _checksum(data: Any) -> int:
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())
