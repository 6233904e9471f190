"""Weights that are in a checkpoint already: the method that rounds nothing."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from torch_quant.checkpoints.compressed_tensors import COMPRESSED_TENSORS, OWN
from torch_quant.checkpoints.files import CONFIG, CheckpointFiles
from torch_quant.checkpoints.gptq import GPTQLayout
from torch_quant.checkpoints.layout import Layout, Stored, wrong_entry
from torch_quant.core.methods import WeightMethod, register_weight_method
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.statistics import Statistic

__all__ = ["LAYOUTS", "Checkpoint", "StoredWeight", "opened"]

LAYOUTS: dict[str, Layout] = {each.name: each for each in (COMPRESSED_TENSORS, GPTQLayout(), OWN)}
"""By what ``quant_method`` calls them."""


class Checkpoint:
    """The quantized and the float tensors of a folder.

    Args:
        folder: of a checkpoint.

    Raises:
        InvalidConfig: it is none, of an unknown layout, or damaged; says which file.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.files = CheckpointFiles(folder)
        about = self.files.config.get("quantization_config")
        if not isinstance(about, dict):
            raise InvalidConfig(
                f"{self.files.folder / CONFIG} has no quantization_config: the checkpoint is of a "
                "float model; load it with its own library and quantize it"
            )
        method = about.get("quant_method")
        if method not in LAYOUTS:
            known = " or ".join(map(repr, LAYOUTS))
            raise wrong_entry(self.files, "quant_method", method, known)
        self.layout = LAYOUTS[method]
        self.stored = self.layout.stored(self.files, about)
        if not self.stored:
            raise InvalidConfig(
                f"{self.files.folder} has no quantized weight, though {CONFIG} says {method!r}"
            )
        used = {name for each in self.stored.values() for name in each.tensors}
        self.floats = [name for name in self.files if name not in used]

    def read(self, module: str) -> tuple[Tensor, QParams]:
        """Codes and grid of the weight of a module."""
        return self.layout.read(self.files, module, self.stored[module])


@functools.lru_cache(maxsize=2)
def _opened(folder: str, files: tuple[tuple[str, int, int], ...]) -> Checkpoint:
    return Checkpoint(folder)


def opened(folder: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a folder, opened once; raises as :class:`Checkpoint` does."""
    path = Path(folder).absolute()
    files = sorted(each for each in path.glob("*") if each.suffix in (".json", ".safetensors"))
    facts = ((each.name, each.stat().st_mtime_ns, each.stat().st_size) for each in files)
    return _opened(str(path), tuple(facts))


@register_weight_method
@dataclass(frozen=True)
class StoredWeight(WeightMethod):
    """The codes that a checkpoint has: they are read when they are asked for, and never rounded.

    Args:
        folder: of the checkpoint.
        module: whose weight it is there.
    """

    name = "stored"

    folder: str
    module: str

    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: Mapping[str, Statistic]
    ) -> tuple[Tensor, QParams]:
        checkpoint = opened(self.folder)
        stored = checkpoint.stored.get(self.module)
        if stored is None:
            raise InvalidConfig(f"{self.folder} has no quantized weight of {self.module}")
        self._check(stored, weight, spec)
        codes, qparams = checkpoint.read(self.module)
        return codes, replace(qparams, spec=spec)

    def _check(self, stored: Stored, weight: Tensor, spec: QuantSpec) -> None:
        wanted = replace(spec, granularity=spec.granularity.unbound())
        if tuple(weight.shape) != stored.shape or wanted != stored.spec:
            raise InvalidConfig(
                f"{self.folder} holds the weight of {self.module} as {stored.spec} of shape "
                f"{stored.shape}; the model asks for {spec} of shape {tuple(weight.shape)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As data; what was saved with it reads the checkpoint where it lies."""
        return {"name": self.name, "folder": self.folder, "module": self.module}
