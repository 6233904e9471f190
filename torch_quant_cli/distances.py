"""How far the outputs of two models are apart, and whether that is what was asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch_quant_cli.running import finite

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Distance", "distance"]


@dataclass(frozen=True)
class Distance:
    """Of all outputs together.

    Args:
        sqnr: in dB; ``inf`` where both are equal, NaN where nothing could be compared.
        cosine: the mean over the rows of the first output; None where that has no rows.

    >>> Distance(float("nan"), None).shown, Distance(float("nan"), None).reaches(10.0)
    ('SQNR nan dB', False)
    >>> Distance(float("inf"), 1.0).shown, Distance(21.26, 0.99).shown
    ('equal', 'SQNR 21.3 dB, cosine 0.9900')
    """

    sqnr: float
    cosine: float | None

    @property
    def equal(self) -> bool:
        """Whether every finite number of the one is that of the other."""
        return self.sqnr == math.inf

    @property
    def shown(self) -> str:
        """In words."""
        if self.equal:
            return "equal"
        angle = "" if finite(self.cosine) is None else f", cosine {self.cosine:.4f}"
        return f"SQNR {self.sqnr:.1f} dB{angle}"

    def reaches(self, goal: float | None) -> bool:
        """Whether ``goal``, in dB, is reached; NaN reaches none."""
        return goal is None or self.sqnr >= goal

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity and no NaN."""
        return {
            "sqnr_db": finite(self.sqnr),
            "equal": self.equal,
            "cosine": finite(self.cosine),
        }


def distance(pairs: list[tuple[list[Tensor], list[Tensor]]]) -> Distance:
    """Of outputs that are given batch by batch, the reference first; shapes are the same.

    >>> import torch
    >>> distance([([torch.ones(2, 3)], [torch.ones(2, 3)])]).shown
    'equal'
    >>> distance([([torch.full((2,), torch.nan)], [torch.full((2,), torch.nan)])]).shown
    'SQNR nan dB'
    """
    import torch

    from torch_quant.core.metrics import cosine, sqnr

    floats = [x for each, _ in pairs for x in each]
    others = [x for _, each in pairs for x in each]
    found = sqnr(floats, others)
    if found == math.inf and not any(bool(torch.isfinite(x).any()) for x in floats):
        found = math.nan
    angles = [
        float(cosine(a[0].flatten(0, -2), b[0].flatten(0, -2)).mean())
        for a, b in pairs
        if a and a[0].dim() > 1
    ]
    return Distance(found, sum(angles) / len(angles) if angles else None)
