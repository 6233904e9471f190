"""A checkpoint that is written file by file, with an index."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor

from torch_quant.checkpoints.files import INDEX, WEIGHTS
from torch_quant.io.files import save_tensors

__all__ = ["Shards"]


class Shards:
    """Takes tensors, and writes a file as often as there are enough.

    Args:
        folder: to write into.
        limit: bytes of a file, but for those of a single larger tensor.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._held: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._files: list[list[str]] = []
        """Names of the tensors in each file."""

    def add(self, name: str, x: Tensor) -> None:
        """Take a tensor; it is held until its file is written.

        Raises:
            OSError: a file cannot be written.
        """
        size = x.numel() * x.element_size()
        if self._held and self._size + size > self.limit:
            self._write()
        self._held[name] = x.contiguous()
        self._size += size
        self._total += size
        if self._size >= self.limit:
            self._write()

    def _write(self) -> None:
        save_tensors(self._held, self._partial(len(self._files)))
        self._files.append(list(self._held))
        self._held, self._size = {}, 0

    def _partial(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"

    def finish(self) -> None:
        """Write what is left, and give the files their names; raises as :meth:`add` does."""
        if self._held or not self._files:
            self._write()
        count = len(self._files)
        if count == 1:
            os.replace(self._partial(0), self.folder / WEIGHTS)
            return
        weight_map: dict[str, str] = {}
        for i, tensors in enumerate(self._files):
            name = f"model-{i + 1:05}-of-{count:05}.safetensors"
            os.replace(self._partial(i), self.folder / name)
            weight_map |= dict.fromkeys(tensors, name)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True)
        (self.folder / INDEX).write_text(f"{text}\n", encoding="utf-8")
