"""How near to the float model a runtime and its reference are, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from flows import Inputs
from onnx_files import tensors
from torch import Tensor, nn
from zoo_base import Inputs as ZooInputs

__all__ = ["DEVIATION", "FEWEST", "LOSS", "MOST", "Quality", "compare_quality"]

LOSS = 0.5
"""dB that a runtime may be worse than the reference, end to end."""

DEVIATION = LOSS / 4
"""dB. Two right computations differ by chance; here by ``LOSS`` in one of 30,000 cases."""

FEWEST, MOST = 96, 6000
"""Samples."""


@dataclass(frozen=True)
class Quality:
    """Energies by sample, ``(samples,)`` each.

    Args:
        signal: of the float outputs.
        found: of the errors of the runtime.
        reference: of the errors of the reference.
    """

    signal: Tensor
    found: Tensor
    reference: Tensor

    @property
    def sqnr(self) -> float:
        """Of the runtime, over all samples, dB."""
        return _decibels(self.signal.sum() / self.found.sum())

    @property
    def loss(self) -> float:
        """By how many dB that is below the reference's."""
        return _decibels(self.found.sum() / self.reference.sum())

    @property
    def deviation(self) -> float:
        """Standard deviation of ``loss`` by the choice of the samples, by the jackknife."""
        found, reference = self.found.sum() - self.found, self.reference.sum() - self.reference
        without = 10 * torch.log10(found / reference)
        count = len(without)
        return math.sqrt((count - 1) * float(without.var(correction=0)))

    def __str__(self) -> str:
        return (
            f"found {self.sqnr:.2f} dB, reference {self.sqnr + self.loss:.2f} dB, "
            f"+- {self.deviation:.2f} dB on {len(self.signal)} samples"
        )


def compare_quality(
    model: nn.Module,
    run: Callable[[Inputs], list[Tensor]],
    simulation: nn.Module,
    inputs: ZooInputs,
    batch: int,
    deviation: float,
) -> Quality:
    """Run ``model``, what is to be judged and its ``simulation`` on batches of ``batch``.

    Rounding makes the errors of two right computations differ by chance. As many samples are drawn
    as it takes to know ``loss`` up to ``deviation`` dB, twice as many each time; nothing else
    stops it, in particular not the loss itself.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    count, total = FEWEST, 0
    while True:
        data = inputs(count)
        for start in range(0, count, batch):
            some: Inputs = ((), {key: x[start : start + batch] for key, x in data.items()})
            outputs = run(some)
            expected, simulated = tensors(model, some), tensors(simulation, some)
            assert [x.shape for x in outputs] == [x.shape for x in expected]
            found.append(_energies(expected, outputs, simulated))
        quality = Quality(*(torch.cat(each) for each in zip(*found, strict=True)))
        total, count = total + count, 2 * count
        if quality.deviation <= deviation or total + count > MOST:
            return quality


def _energies(
    expected: list[Tensor], outputs: list[Tensor], simulated: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    exact, *others = (_rows(each) for each in (expected, outputs, simulated))
    finite = torch.isfinite(exact)  # masked positions, -inf in all, carry no noise
    exact = exact.where(finite, 0.0)
    errors = [(exact - each).where(finite, 0.0).square().sum(1) for each in others]
    return exact.square().sum(1), errors[0], errors[1]


def _rows(outputs: list[Tensor]) -> Tensor:
    """All float outputs, a row for each sample, in double precision."""
    return torch.cat([x.double().flatten(1) for x in outputs if x.is_floating_point()], 1)


def _decibels(ratio: Tensor) -> float:
    return 10 * math.log10(float(ratio))
