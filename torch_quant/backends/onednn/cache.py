"""Weights packed for kernels, made at the first call and kept beside the int8 ones.

How a convolution's weight lies best depends on the size of the image: packed for another one, it
may be reordered at every call, which can take a hundred times as long as the convolution. But most
sizes want the same layout. So a weight is packed once for each *layout*, and each size remembers
its own.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["PackedWeights"]

_MOST_EXTRA = 256 * 2**20
"""Bytes of packed weights beyond one layout for each weight; the least recently used go first."""
_MOST_VARIANTS = 4096
"""How many sizes a weight remembers the layout of."""
_SWEEPS = 16
"""The cache is searched for unused weights when a 16th as many new ones have come."""


@dataclass(eq=False)
class _Layout:
    packed: Tensor
    size: int
    used: int


@dataclass(eq=False)
class _Weight:
    """All layouts of one weight.

    It keeps the weight's storage alive, so that the address stays a safe key. PyTorch hands out one
    Python object for a storage, however many hold it: this class counts as one user.
    """

    storage: torch.UntypedStorage
    version: int
    zero_points: Tensor
    layouts: dict[Hashable, _Layout] = field(default_factory=dict)
    variants: dict[Hashable, _Layout] = field(default_factory=dict)

    @property
    def unused(self) -> bool:
        """Whether nobody else keeps the weight."""
        return bool(torch._C._storage_Use_Count(self.storage._cdata) <= 1)

    def spare(self) -> list[_Layout]:
        """All layouts but the one that was used last."""
        return sorted(self.layouts.values(), key=lambda layout: layout.used)[:-1]

    def drop(self, layout: _Layout) -> None:
        self.layouts = {k: v for k, v in self.layouts.items() if v is not layout}
        self.variants = {k: v for k, v in self.variants.items() if v is not layout}


def _version(weight: Tensor) -> int:
    """How often ``weight`` was written to in place; inference tensors do not count that."""
    return 0 if weight.is_inference() else weight._version


def _describe(packed: Tensor, variant: Hashable) -> Hashable:
    """The layout of a packed weight: sizes, strides and blocks, as numbers below 2**32.

    They stand in words of 8 bytes. Some upper halves are padding that nobody has written to. Plain
    bytes have no description, and belong to one variant.
    """
    if not packed.is_mkldnn:
        return variant
    description: Tensor = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
    whole = description[: len(description) // 8 * 8].clone().view(torch.int32)
    return tuple(whole[::2].tolist())


class PackedWeights:
    """A cache of packed weights that any thread may use.

    Args:
        most_extra: bytes that second and further layouts of weights may take together.
        most_variants: how many variants of a weight are remembered.
    """

    def __init__(self, most_extra: int = _MOST_EXTRA, most_variants: int = _MOST_VARIANTS) -> None:
        self.most_extra, self.most_variants = most_extra, most_variants
        self.packs = 0
        """How often a weight was packed."""
        self._weights: dict[Hashable, _Weight] = {}
        self._lock = threading.Lock()
        self._clock = itertools.count()
        self._since_sweep = 0

    def __len__(self) -> int:
        """How many weights are packed that somebody still keeps."""
        with self._lock:
            self._sweep()
            return len(self._weights)

    @property
    def layouts(self) -> int:
        """How many packed copies there are."""
        with self._lock:
            return sum(len(weight.layouts) for weight in self._weights.values())

    def get(
        self, weight: Tensor, variant: Hashable, pack: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The packed form of ``weight`` and its zero points, int32, shape ``[channels]``.

        Args:
            weight: int8, channels first.
            variant: all else that the packed form may depend on.
            pack: packs ``weight``; called if this variant is not known.
        """
        key = (weight.data_ptr(), weight.shape)
        known = self._known(key, weight)
        layout = known.variants.get(variant) if known is not None else None
        if known is None or layout is None:
            with self._lock:
                known, layout = self._pack(key, weight, variant, pack)
        layout.used = next(self._clock)
        return layout.packed, known.zero_points

    def _known(self, key: Hashable, weight: Tensor) -> _Weight | None:
        known = self._weights.get(key)
        if known is None or known.version != _version(weight):
            return None
        # Sharing memory with other processes moves a storage, and its old address is free again.
        return known if known.storage._cdata == weight.untyped_storage()._cdata else None

    def _pack(
        self, key: Hashable, weight: Tensor, variant: Hashable, pack: Callable[[], Tensor]
    ) -> tuple[_Weight, _Layout]:
        known = self._known(key, weight)
        if known is None:
            self._since_sweep += 1
            if self._since_sweep * _SWEEPS >= len(self._weights):
                self._sweep()
            zero_points = torch.zeros(weight.shape[0], dtype=torch.int32)
            known = _Weight(weight.untyped_storage(), _version(weight), zero_points)
            self._weights[key] = known
        if variant in known.variants:  # another thread was first
            return known, known.variants[variant]
        packed = pack()
        self.packs += 1
        if len(known.variants) >= self.most_variants:
            known.variants = {}
        description = _describe(packed, variant)
        layout = known.layouts.get(description)
        if layout is None:
            size = torch.ops.mkldnn._nbytes(packed) if packed.is_mkldnn else packed.nbytes
            layout = known.layouts[description] = _Layout(packed, size, next(self._clock))
        known.variants[variant] = layout
        if len(known.layouts) > 1:
            layout.used = next(self._clock)
            self._evict()
        return known, layout

    def _evict(self) -> None:
        spare = [(layout, weight) for weight in self._weights.values() for layout in weight.spare()]
        extra = sum(layout.size for layout, _ in spare)
        for layout, weight in sorted(spare, key=lambda each: each[0].used):
            if extra <= self.most_extra:
                break
            weight.drop(layout)
            extra -= layout.size

    def _sweep(self) -> None:
        self._since_sweep = 0
        for key, weight in list(self._weights.items()):
            if weight.unused:
                del self._weights[key]
