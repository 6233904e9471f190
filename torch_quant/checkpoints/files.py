"""The files of a checkpoint: ``config.json`` and safetensors, one or several with an index."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from torch_quant.errors import InvalidConfig
from torch_quant.io.kinds import what_it_holds

__all__ = ["CONFIG", "INDEX", "WEIGHTS", "CheckpointFiles", "read_json"]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        InvalidConfig: there is no such file, or it holds something else; says which.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidConfig(
            f"cannot read {file}: {error.strerror}; give the folder of a checkpoint, which has "
            f"{CONFIG} and {WEIGHTS}{what_it_holds(file.parent)}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(f"{file} is truncated or no JSON: {error}") from error
    if not isinstance(data, dict):
        raise InvalidConfig(f"{file} holds a {type(data).__name__}; expected an object")
    return data


class CheckpointFiles:
    """The tensors of a checkpoint by name; each is read from disk when it is asked for.

    Args:
        folder: has ``config.json``, and ``model.safetensors`` or several files with an index.

    Raises:
        InvalidConfig: a file is missing, truncated or something else; says which.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.config = read_json(self.folder / CONFIG)
        self._opened: dict[Path, Any] = {}
        self._file_of = self._files()

    def _files(self) -> dict[str, Path]:
        index = self.folder / INDEX
        if not index.is_file():
            file = self.folder / WEIGHTS
            return dict.fromkeys(self._open(file).keys(), file)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InvalidConfig(f"{index} has no weight_map, which names the file of each tensor")
        found = {}
        for name, file_name in weight_map.items():
            file = self.folder / str(file_name)
            if file.parent != self.folder:
                raise InvalidConfig(f"{index} names {file_name!r}, which is not in its folder")
            if name not in set(self._open(file).keys()):
                raise InvalidConfig(f"{file} lacks the tensor {name}, which {index.name} names")
            found[name] = file
        if (self.folder / WEIGHTS).is_file() and WEIGHTS not in weight_map.values():
            raise InvalidConfig(
                f"{self.folder} has a {WEIGHTS} and an {INDEX} that names other files: two models, "
                "of which transformers reads the first. Remove the one that is not meant"
            )
        return found

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            from safetensors import SafetensorError, safe_open

            if not file.is_file():
                raise InvalidConfig(
                    f"there is no {file}; weights are read from safetensors, not from pickles"
                )
            try:
                self._opened[file] = safe_open(str(file), framework="pt")
            except (OSError, SafetensorError) as error:
                raise InvalidConfig(
                    f"{file} is truncated or no safetensors file: {error}"
                ) from error
        return self._opened[file]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype of a tensor, as safetensors names it: ``"I32"``."""
        return str(self._slice(name).get_dtype())

    def _slice(self, name: str) -> Any:
        return self._open(self.file(name)).get_slice(name)

    def file(self, name: str) -> Path:
        """Where a tensor is.

        Raises:
            InvalidConfig: there is none of that name.
        """
        if name not in self._file_of:
            raise InvalidConfig(f"{self.folder} lacks the tensor {name}")
        return self._file_of[name]

    def tensor(self, name: str) -> Tensor:
        """One tensor; raises as :meth:`file` does."""
        found: Tensor = self._open(self.file(name)).get_tensor(name)
        return found

    def close(self) -> None:
        """Close what is open; it is opened again when a tensor is asked for."""
        self._opened.clear()

    def check(self, name: str, shape: tuple[int, ...], *dtypes: str) -> None:
        """Look at shape and dtype of a tensor, which is not read.

        Args:
            name: of the tensor.
            shape: what it has to be.
            dtypes: those allowed, as safetensors names them; any if none is given.

        Raises:
            InvalidConfig: it is missing, or is another; says in which file.
        """
        given, dtype = self.shape(name), self.dtype(name)
        if given != shape or (dtypes and dtype not in dtypes):
            kinds = f" of {' or '.join(dtypes)}" if dtypes else ""
            raise InvalidConfig(
                f"{self.file(name)}: the tensor {name} has shape {given} of {dtype}; expected "
                f"{shape}{kinds}"
            )
