"""Finished blocks in a folder, so that a run that was interrupted goes on where it was."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from torch_quant.algorithms.blocks import Block, Layer
from torch_quant.core.plan import QuantPlan
from torch_quant.core.rounded import RoundedWeights, checksum
from torch_quant.errors import InvalidConfig
from torch_quant.io.data.parted import joined, parted
from torch_quant.io.folder import read_folder, write_folder
from torch_quant.rounding.experts import Experts

__all__ = ["Folder", "Found"]

_KIND = "rounded"


@dataclass(frozen=True)
class Found:
    """What a folder has of one block."""

    weights: RoundedWeights

    def apply(self, block: Block, experts: Iterable[Experts]) -> None:
        """Scale and round the block, and experts in it, as it was when it was written."""
        for name, how in self.weights.scaled.items():
            path = name.removeprefix(f"{block.path}.") if block.path else name
            block.rescale(path, how)
        every: tuple[Layer | Experts, ...] = (*block.layers, *experts)
        for layer in every:
            rounded = self.weights.sites[layer.site]
            layer.round_to(rounded.codes, rounded.qparams)


def _joint(sums: Iterable[int]) -> int:
    """One number for several."""
    found = 0
    for each in sums:
        found = zlib.crc32(each.to_bytes(4, "little"), found)
    return found


class Folder:
    """Where finished blocks are kept, each in a folder of its own.

    Args:
        path: made if need be.
        plan: what each site is rounded to, and how.
        batches: the data; other data are refused.
        weights: checksums of all parameters of the model; other weights are refused.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        plan: QuantPlan,
        batches: Iterable[Any],
        weights: Iterable[int],
    ) -> None:
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise InvalidConfig(f"folder={path!r}; expected the path of a folder")
        self.path, self.plan = Path(path), plan
        self.model = _joint(weights)
        leaves = tree_leaves(list(batches))
        self.data = _joint(checksum(leaf) for leaf in leaves if isinstance(leaf, Tensor))

    def write(self, block: str, weights: RoundedWeights) -> None:
        """Keep a block, whole or not at all; raises :class:`InvalidConfig` if it cannot be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidConfig(f"folder={self.path}: {error.strerror}") from error
        tensors: dict[str, Tensor] = {}
        state = parted(weights.state_dict(), tensors)
        how = {site: self._how(site) for site in weights.sites}
        data = {"data": self.data, "model": self.model, "how": how, "weights": state}
        write_folder(self._folder(block), _KIND, data, tensors)

    def read(self, block: str, sums: Mapping[str, int]) -> Found | None:
        """What is there of a block, None if nothing is.

        Args:
            block: its path.
            sums: site -> checksum of its float weight.

        Raises:
            InvalidConfig: it is of other weights, settings or data, or was changed since.
        """
        folder = self._folder(block)
        if not (folder / f"{_KIND}.json").exists():
            return None
        data, tensors = read_folder(folder, _KIND)
        weights = RoundedWeights.from_state(joined(data["weights"], tensors))
        same = data["model"] == self.model and {
            site: each.checksum for site, each in weights.sites.items()
        } == dict(sums)
        settings = data["how"] == {site: self._how(site) for site in sums}
        if not (same and settings and data["data"] == self.data):
            what = "weights" if not same else "settings" if not settings else "batches"
            raise InvalidConfig(
                f"{folder} was made with other {what}: give another folder, or delete this one"
            )
        return Found(weights)

    def _folder(self, block: str) -> Path:
        return self.path / (block or "outside")

    def _how(self, site: str) -> dict[str, Any]:
        entry = self.plan[site].to_dict()
        return {key: entry[key] for key in ("weight", "method", "transforms")}
