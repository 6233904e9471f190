"""How far the inputs of layers have moved from the float model's, since blocks before are rounded.

A layer with weight ``W`` that reads ``x`` should give what ``W x'`` is in the float model. The
weight closest to that for the vectors at hand is, by least squares,

    W' = W + W D H^-1,   D = mean((x' - x) x^T),   H = mean(x x^T)

so that rounding ``W'`` in place of ``W`` makes up for what the layers before have lost, as far as
that depends on ``x``. Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric
Calibration", 2025, minimize the same error inside of the rounding; Zhang et al., "Qronos:
Correcting the Past by Shaping the Future", 2025, begin from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Sequence

import torch
from torch import Tensor

from torch_quant.algorithms.block_training import replaced_weights
from torch_quant.algorithms.blocks import Block, Layer, Sample
from torch_quant.statistics import Hessian

__all__ = ["drifts", "made_up_for"]


def drifts(block: Block, layers: Sequence[Layer]) -> dict[Layer, tuple[Hessian, Tensor]]:
    """``H`` and ``D`` of what each layer reads, ``[in, in]``, over all samples.

    Each sample runs twice, once as float blocks before make it, through float weights. Only layers
    that run once in each sample, with a vector for each of the block's own, are in it: the rows of
    others, of an expert say, need not be those of the same tokens.

    Args:
        block: has ``floats``.
        layers: of it.
    """
    assert block.floats is not None
    exact = {each: each.exact for each in block.layers if each.exact is not None}
    leads = {each.layers[0]: each.layers for each in block.reading(layers) if each.once}
    found = {lead: (Hessian(), torch.zeros(())) for lead in leads}
    for sample, before in zip(block.samples, block.floats, strict=True):
        with replaced_weights(exact):
            float_inputs = _inputs(block, before, found)
        inputs, rows = _inputs(block, sample, found), len(_rows(sample.hidden))
        for lead in list(found):
            x, other = inputs.get(lead), float_inputs.get(lead)
            if x is None or other is None or x.shape != other.shape or len(x) != rows:
                del found[lead]
                continue
            hessian, sums = found[lead]
            hessian.observe(x)
            found[lead] = hessian, sums + (other - x).T @ x
    return {
        layer: (hessian, sums / hessian.rows)
        for lead, (hessian, sums) in found.items()
        for layer in leads[lead]
    }


def made_up_for(weight: Tensor, drift: Tensor, moments: Tensor, damping: float) -> Tensor:
    """``W'``; ``weight`` itself where the moments cannot be inverted.

    Args:
        weight: ``[out, in]``.
        drift: ``D``.
        moments: ``H``.
        damping: added to its diagonal, as a share of its mean.
    """
    damped = moments + torch.eye(len(moments)) * (damping * moments.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) or not bool(torch.isfinite(factor).all()):
        return weight
    moved = torch.cholesky_solve((weight @ drift).T, factor).T
    return weight + moved if bool(torch.isfinite(moved).all()) else weight


class _Seen(BaseException):
    """Ends a call of the block once all is known of it; nothing that the model catches."""


def _inputs(block: Block, sample: Sample, leads: Container[Layer]) -> dict[Layer, Tensor]:
    """What the layers read in one sample, ``[rows, in]``."""
    found: dict[Layer, Tensor] = {}
    left = sum(each in leads for each in block.layers)

    def keep(layer: Layer, x: Tensor) -> None:
        if layer in leads:
            found[layer] = _rows(x.detach()).float()
            if len(found) == left:  # what comes behind need not run
                raise _Seen

    with torch.no_grad(), block.watched(keep), contextlib.suppress(_Seen):
        block.call(sample)
    return found


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
