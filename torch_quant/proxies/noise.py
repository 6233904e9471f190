"""What quantizing each site adds, locally and at the outputs, as one batch passes its probes.

With local noise ``d = y - y_q`` at a site's result and the gradient ``g`` of
``(outputs * r).sum()`` for random signs ``r``, the mean of ``(g . d)^2`` over ``r`` is ``|J d|^2``:
the energy that the noise has at the outputs, to first order. One forward and one backward give it
for every site at once, and no labels are needed. Each sample of a batch is one draw.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_quant.nn.probe import SiteProbe, track
from torch_quant.sensitivity import NoiseGram, Recorder, SiteStats

__all__ = ["NoisePass"]

_PARTS = 8
"""One row in so many tells the shares of weight and activations."""


@dataclass
class NoisePass:
    """One batch on its way through the probes.

    Args:
        record: takes the sums.
        rows: batch size of the model's inputs.
        anchor: where gradients are asked for; None to record local noise only.
        effects: site -> its noise along the direction of the gradient, for each sample.
        shares: site -> what of that is due to weight and activations.
    """

    record: Recorder
    rows: int
    anchor: Tensor | None = None
    effects: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, SiteStats] = field(default_factory=dict)

    def visit(self, probe: SiteProbe, y: Tensor, args: tuple[Any, ...]) -> Tensor:
        stats = self.record.of(probe.name)
        with torch.no_grad():
            inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
            exact = probe.reference(y.detach(), inputs)
            # Float first: the difference takes its memory layout, which gradients have too.
            noise = exact - probe.quantized(*inputs)  # type: ignore[operator]
            stats.signal += _dot(exact, exact)
            stats.noise += _dot(noise, noise)
            part = self._activation_part(probe, exact, inputs)
            if part is not None:  # by energy, until the gradient has come to every site
                _add_shares(stats, noise[: len(part)], part)
        if self.anchor is None:
            return y
        y = track(y, self.anchor)
        y.register_hook(lambda grad: self._arrived(probe.name, grad, noise, part))
        return y

    def _activation_part(
        self, probe: SiteProbe, exact: Tensor, inputs: tuple[Any, ...]
    ) -> Tensor | None:
        """The noise of quantized activations alone, for the first rows of the result."""
        if probe.half is None:
            return None
        if probe.operand is None:
            return exact - probe.half(*inputs)  # type: ignore[operator]
        x, rows = inputs[probe.operand], len(exact) if exact.dim() > 1 else 0
        if rows and len(x) == rows:
            few = -(-rows // _PARTS)
            inputs = (*inputs[: probe.operand], x[:few], *inputs[probe.operand + 1 :])
            exact = exact[:few]
        return exact - probe.half(*inputs)  # type: ignore[operator]

    @torch.no_grad()
    def _arrived(self, name: str, grad: Tensor, noise: Tensor, part: Tensor | None) -> None:
        """The gradient of a site's result."""
        stats = self.record.of(name)
        apart = grad.dim() > 0 and len(grad) % self.rows == 0
        effect = _projected(noise, grad, self.rows if apart else 1)
        known = self.effects.get(name)  # of another call of the site
        if known is not None and len(known) != len(effect):
            known, effect = known.sum()[None], effect.sum()[None]
        self.effects[name] = effect if known is None else known + effect
        stats.reached = True
        if part is not None:
            shares = self.shares.setdefault(name, SiteStats())
            _add_shares(shares, noise[: len(part)], part, grad[: len(part)])

    def finish(self) -> None:
        """Hand over what has arrived."""
        if self.effects:
            self.record.gram = NoiseGram.of(self.effects, self.rows)
        for name, stats in self.record.sites.items():
            shares = self.shares.get(name, SiteStats())
            stats.from_weight, stats.from_activation = shares.from_weight, shares.from_activation


def _add_shares(stats: SiteStats, noise: Tensor, part: Tensor, grad: Tensor | None = None) -> None:
    """Split the error of the first rows: by their effect on the output, or by their energy."""
    for rest, name in ((part, "from_activation"), (noise - part, "from_weight")):
        if grad is None:
            value = _dot(rest, rest)
        else:
            value = float(_projected(rest, grad, max(len(rest), 1)).square().sum())
        setattr(stats, name, getattr(stats, name) + value)


def _projected(x: Tensor, grad: Tensor, groups: int) -> Tensor:
    """Scalar products of so many equal parts, float64, shape ``[groups]``."""
    products: Tensor = torch.linalg.vecdot(x.reshape(groups, -1), grad.reshape(groups, -1))
    return products.double()


def _dot(x: Tensor, y: Tensor) -> float:
    return float(torch.linalg.vecdot(x.reshape(-1), y.reshape(-1)))
