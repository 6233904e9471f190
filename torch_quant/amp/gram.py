"""How the noise of every site shows at the outputs, alone and together with the others'.

``p_i = g . d_i`` is the noise of site ``i`` along one random direction of the outputs. The mean of
``p_i p_j`` over directions and samples is ``<J d_i, J d_j>``: the energy of the site's noise for
``i = j``, else what two of them add to, or take from, each other's. The noise of any set of sites
is the sum over its part of this matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["NoiseGram"]

_LEAST = 0.25
"""Of the sum of single energies: less than this share of it is an artefact of few samples."""


@dataclass
class NoiseGram:
    """Sums of ``p_i p_j``.

    Args:
        matrix: shape ``[sites, sites]``, float64.
        squares: sums of the squares of what ``matrix`` sums, same shape: how far to trust it.
        draws: how many (sample, direction) pairs.
        index: site name -> row.
    """

    matrix: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    draws: int = 0
    index: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, effects: Mapping[str, Tensor], rows: int) -> NoiseGram:
        """Of one batch.

        Args:
            effects: site -> ``p`` for each sample, shape ``[rows]``; or ``[1]``, their sum, where
                the samples of a site's result cannot be told apart.
            rows: batch size.
        """
        whole = torch.tensor([len(p) != rows for p in effects.values()])
        stacked = torch.stack([p.expand(rows) for p in effects.values()])
        matrix = stacked @ stacked.T
        matrix[whole[:, None] & whole[None]] /= rows  # counted once for each sample
        one_draw = whole[:, None] | whole[None]
        squares = torch.where(one_draw, matrix.square(), stacked.square() @ stacked.square().T)
        return cls(matrix, squares, rows, {name: i for i, name in enumerate(effects)})

    def add(self, other: NoiseGram) -> None:
        """Take in another one; sites may differ."""
        for name in other.index:
            self.index.setdefault(name, len(self.index))
        count, known = len(self.index), len(self.matrix)
        places = torch.tensor([self.index[name] for name in other.index], dtype=torch.int64)
        for name in ("matrix", "squares"):
            total = torch.zeros(count, count, dtype=torch.float64)
            total[:known, :known] = getattr(self, name)
            total[places[:, None], places[None]] += getattr(other, name)
            setattr(self, name, total)
        self.draws += other.draws

    def of_site(self, name: str) -> float:
        """Energy of one site's noise at the outputs."""
        return float(self.matrix[self.index[name], self.index[name]]) if name in self.index else 0.0

    def noise(self, names: Iterable[str]) -> float:
        """Energy at the outputs of the noise of ``names`` together."""
        rows = torch.tensor([self.index[n] for n in names if n in self.index], dtype=torch.int64)
        part = self.shrunk()[rows[:, None], rows[None]]
        return float(torch.maximum(part.sum(), _LEAST * part.diagonal().sum()))

    def part(self, names: Iterable[str]) -> NoiseGram:
        """What it has of some sites alone."""
        kept = [name for name in names if name in self.index]
        rows = torch.tensor([self.index[name] for name in kept], dtype=torch.int64)
        matrix, squares = (each[rows[:, None], rows[None]] for each in (self.matrix, self.squares))
        return NoiseGram(matrix, squares, self.draws, {name: i for i, name in enumerate(kept)})

    @property
    def trust(self) -> float:
        """By what off-diagonal entries are multiplied, as chance may have made them: 0 to 1.

        ``1 - sum of variances / sum of squares`` of these entries: shrinkage to the diagonal
        (Schaefer and Strimmer 2005, target D).
        """
        off = self.matrix - torch.diag(self.matrix.diagonal())
        variances = self.squares - self.matrix.square() / max(self.draws, 1)
        chance = variances.sum() - variances.diagonal().sum()
        return float((1.0 - chance / off.square().sum().clamp_min(1e-300)).clamp(0.0, 1.0))

    def shrunk(self, trust: float | None = None) -> Tensor:
        """The matrix, its off-diagonal entries times ``trust``, its own by default."""
        diagonal = torch.diag(self.matrix.diagonal())
        trust = self.trust if trust is None else trust
        return diagonal + trust * (self.matrix - diagonal)
