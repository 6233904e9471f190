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
        draws: how many (sample, direction) pairs.
        index: site name -> row.
    """

    matrix: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
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
        both = whole[:, None] & whole[None]
        matrix[both] /= rows  # counted once for each sample
        return cls(matrix, rows, {name: i for i, name in enumerate(effects)})

    def add(self, other: NoiseGram) -> None:
        """Take in another one; sites may differ."""
        for name in other.index:
            self.index.setdefault(name, len(self.index))
        count = len(self.index)
        matrix = torch.zeros(count, count, dtype=torch.float64)
        known = len(self.matrix)
        matrix[:known, :known] = self.matrix
        places = torch.tensor([self.index[name] for name in other.index], dtype=torch.int64)
        matrix[places[:, None], places[None]] += other.matrix
        self.matrix, self.draws = matrix, self.draws + other.draws

    def of_site(self, name: str) -> float:
        """Energy of one site's noise at the outputs."""
        return float(self.matrix[self.index[name], self.index[name]]) if name in self.index else 0.0

    def noise(self, names: Iterable[str]) -> float:
        """Energy at the outputs of the noise of ``names`` together."""
        rows = torch.tensor([self.index[n] for n in names if n in self.index], dtype=torch.int64)
        part = self.shrunk()[rows[:, None], rows[None]]
        return float(torch.maximum(part.sum(), _LEAST * part.diagonal().sum()))

    def shrunk(self) -> Tensor:
        """The matrix, each off-diagonal entry pulled to 0 as far as chance may have made it.

        ``c (1 - 1/z^2)+`` with ``z`` the entry in units of its standard error
        ``sqrt(c_ii c_jj / draws)``: the positive-part James-Stein estimate of a single mean.
        """
        diagonal = self.matrix.diagonal()
        variance = diagonal[:, None] * diagonal[None] / max(self.draws, 1)
        kept = (1.0 - variance / self.matrix.square().clamp_min(1e-300)).clamp(0.0, 1.0)
        kept.fill_diagonal_(1.0)
        return self.matrix * kept
