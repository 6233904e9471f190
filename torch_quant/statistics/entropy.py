"""The range that loses the least information: Kullback-Leibler divergence."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_quant.core.spec import QuantSpec
from torch_quant.statistics._bins import BinnedObserver, Bins
from torch_quant.statistics._search import Cost, Range, best_range, grids, shrink
from torch_quant.statistics.base import register_statistic

__all__ = ["EntropyObserver", "divergence"]


def _shares(bins: Bins) -> Tensor:
    """Each bin's share of the counts, float64, ``[channels, bins]``.

    The bin of exact zeros is cut down to its larger neighbour: every grid holds 0 exactly, so the
    zeros of a ReLU must not speak for a fine one.
    """
    counts = bins.counts.double()
    padded = torch.nn.functional.pad(counts, (1, 1))
    neighbour = torch.maximum(padded[:, :-2], padded[:, 2:])
    zero = torch.arange(counts.shape[1]) == -bins.first[:, None]
    counts = torch.where(zero, torch.minimum(counts, neighbour), counts)
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1.0)


def _share_at(shares: Tensor, index: Tensor) -> Tensor:
    """The shares of the bins ``index``, ``[channels, k]``; an index outside: those of the ends."""
    return shares.gather(1, index.clamp(0, shares.shape[1] - 1))


def divergence(bins: Bins, spec: QuantSpec) -> Cost:
    """KL divergence of the clipped histogram from what its quantization can tell of it, by range.

    P is the histogram inside the range; what lies outside is added to its first and its last bin.
    Q spreads what the bins of one code hold, without the outside, evenly over those that are not
    empty in P. (Migacz 2017, "8-bit Inference with TensorRT".) Q is not scaled up to 1, the
    generalized divergence ``sum p log(p / q) - p + q`` is taken instead: the same for the small
    shares that are worth clipping, and no reward for clipping nearly everything. A range with
    nothing inside, or with all steps finer than the bins, costs infinitely much.

    Q is constant over a code, so differences of cumulative sums at the edges of the codes are all
    that a candidate needs: no pass over the histogram.
    """
    shares = _shares(bins)
    size, width, first = shares.shape[1], bins.width[:, None], bins.first[:, None, None]
    terms = torch.stack([shares, (shares > 0).double(), torch.xlogy(shares, shares)])
    sums = torch.nn.functional.pad(terms.cumsum(dim=-1), (1, 0))
    borders = spec.borders
    widest = float(borders.diff().max())
    floor = 1.0 / bins.counts.sum(dim=1).clamp(min=1)[:, None, None]  # of Q: one element

    def cost(low: Tensor, high: Tensor) -> Tensor:
        qparams = grids(low, high, spec)
        scale = qparams.scale.view_as(low).double() / width
        zero = qparams.zero_point.view_as(low)[..., None]
        # Value k has the bins edges[k] to edges[k + 1] - 1: those with their centres in its cell.
        edges = ((borders - zero) * scale[..., None] - 0.5).ceil() - first
        edges = edges.clamp(0, size).to(torch.int64)
        below = sums.gather(2, edges.flatten(1).expand(3, -1, -1)).view(3, *edges.shape)
        q, occupied, plogp = below.diff(dim=-1)
        p, own_entropy = q.clone(), plogp.sum(dim=-1)
        outside = below[0, ..., 0], sums[0, :, -1:] - below[0, ..., -1]
        ends = edges[..., 0], edges[..., -1] - 1
        for code, end, beyond in zip((0, -1), ends, outside, strict=True):
            own = _share_at(shares, end)
            own_entropy += torch.xlogy(own + beyond, own + beyond) - torch.xlogy(own, own)
            p[..., code] += beyond
            occupied[..., code] += (beyond > 0) & (own == 0)
        cross = torch.xlogy(p, q.maximum(floor) / occupied.clamp(min=1.0)).sum(dim=-1)
        lost: Tensor = own_entropy - cross - outside[0] - outside[1]
        usable = (edges[..., -1] > edges[..., 0]) & (scale * widest >= 1.0)
        return lost.masked_fill(~usable, torch.inf)

    return cost


@register_statistic
class EntropyObserver(BinnedObserver):
    """The clipping range of least KL divergence for the spec it is asked for.

    It keeps the shape of the bulk and gives up long tails: harmful to attention probabilities and
    other tensors whose few large values matter. It needs several bins a level, and keeps whole a
    range that has fewer: give per-channel observers of 8 bits ``bins=2048``.

    Bound: batches of at most ``SAMPLES`` elements (in a channel) give the same range bit for bit
    however the data was split. Of larger batches the tails are counted exactly and the body is
    sampled; the shares of two splits then differ like those of two samples of that size.
    """

    name = "entropy"

    def _range(self, spec: QuantSpec) -> Range:
        def pick(bins: Bins, whole: Range) -> Range:
            return shrink(*whole, spec.symmetric, divergence(bins, spec))

        return best_range(self.bins, self.min_val, self.max_val, spec, pick, cells=spec.levels)
