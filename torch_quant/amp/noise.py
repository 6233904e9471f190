"""What quantizing each site adds, locally and at the outputs, as one batch passes its probes.

With local noise ``d = y - y_q`` at a site's result and the gradient ``g`` of
``(outputs * r).sum()`` for random signs ``r``, the mean of ``(g . d)^2`` over ``r`` is ``|J d|^2``:
the energy that the noise has at the outputs, to first order. One forward and one backward give it
for every site at once, and no labels are needed. Each sample of a batch is one draw.

A sample whose gradient is infinite somewhere (that of a square root at 0) is none: it is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_quant.amp.gram import NoiseGram
from torch_quant.amp.padding import Real
from torch_quant.amp.records import CandidateStats, Recorder, choice_key
from torch_quant.nn.probe import SiteProbe, track

__all__ = ["NoisePass", "culprit"]

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
        shares: site -> what of that is due to weight and activations: of some rows of a result,
            which sample each belongs to, and its squares, shape ``[2, rows]``.
        costs: site and candidate -> what ``effects`` has of the site.
        real: which positions count in local noise.
        done: whether gradients that still arrive are no news.
    """

    record: Recorder
    rows: int
    anchor: Tensor | None = None
    effects: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    costs: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    real: Real = field(default_factory=Real)
    done: bool = False

    def visit(self, probe: SiteProbe, y: Tensor, args: tuple[Any, ...]) -> Tensor:
        stats = self.record.of(probe.name)
        with torch.no_grad():
            inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
            exact = probe.reference(y.detach(), inputs)
            # Float first: the difference takes its memory layout, which gradients have too.
            noise = exact - probe.quantized(*inputs)  # type: ignore[operator]
            stats.signal += self._energy(exact, probe.name)
            stats.noise += self._energy(noise, probe.name)
            part = self._activation_part(probe, exact, inputs)
            if part is not None:  # by energy, until the gradient has come to every site
                stats.from_activation += self._energy(part, probe.name, noise)
                rest = noise[: len(part)] - part
                stats.from_weight += self._energy(rest, probe.name, noise)
            others = self._candidates(probe, exact, inputs)
        if self.anchor is None:
            return y
        y = track(y, self.anchor)
        y.register_hook(lambda grad: self._arrived(probe.name, grad, noise, part, others))
        return y

    def _energy(self, x: Tensor, name: str, whole: Tensor | None = None) -> float:
        """The squared norm of its real positions; see :meth:`Real.kept`."""
        x = self.real.kept(x, name, whole).reshape(-1)
        return float(torch.linalg.vecdot(x, x))

    def _candidates(
        self, probe: SiteProbe, exact: Tensor, inputs: tuple[Any, ...]
    ) -> dict[str, Tensor]:
        """The noise of each candidate, in half the bytes: its energy is wanted to two digits."""
        found = {}
        for name, quantized in probe.candidates().items():
            noise = exact - quantized(*inputs)
            stats = self.record.candidates.setdefault((probe.name, name), CandidateStats())
            stats.noise += self._energy(noise, probe.name)
            if self.anchor is not None:
                found[name] = noise.to(torch.bfloat16)
        return found

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
    def _arrived(
        self,
        name: str,
        grad: Tensor,
        noise: Tensor,
        part: Tensor | None,
        others: Mapping[str, Tensor],
    ) -> None:
        """The gradient of a site's result."""
        if self.done:
            return
        stats = self.record.of(name)
        apart = grad.dim() > 0 and len(grad) % self.rows == 0
        groups = self.rows if apart else 1
        self.effects[name] = _joined(self.effects.get(name), _projected(noise, grad, groups))
        for other, theirs in others.items():
            effect = _projected(theirs.to(grad.dtype), grad, groups)
            self.costs[name, other] = _joined(self.costs.get((name, other)), effect)
        stats.reached = True
        if part is not None:
            count = len(part)
            rests = (part, noise[:count] - part)
            squares = [_projected(each, grad[:count], count).square() for each in rests]
            sample = torch.arange(count) // (len(grad) // self.rows if apart else count)
            self.shares.setdefault(name, []).append((sample, torch.stack(squares)))

    def finish(self, outputs: list[Tensor]) -> None:
        """Hand over what has arrived, of the samples whose gradients are finite.

        If samples cannot be told apart, none of them can be left out, so all are. Then only local
        noise is handed over.

        Args:
            outputs: the float outputs of the model.
        """
        self.done = True
        good = self._finite(outputs)
        self.record.left_out = self.rows - int(good.sum())
        if not good.any():
            return
        whole = bool(good.all())
        self.record.output_signal = sum(
            float((x if whole else x.reshape(self.rows, -1)[good]).square().sum()) for x in outputs
        )
        if self.effects:
            effects = {name: p if whole else p[good] for name, p in self.effects.items()}
            self.record.gram = NoiseGram.of(effects, int(good.sum()))
        for key, effect in self.costs.items():
            kept = effect if whole else effect[good]
            self.record.candidates[key].score = float(kept.square().sum())
        if self.record.joint is not None:
            every = self.effects | {choice_key(*key): p for key, p in self.costs.items()}
            finite = {name: p if whole else p[good] for name, p in every.items()}
            self.record.joint = NoiseGram.of(finite, int(good.sum())) if finite else NoiseGram()
        for name, stats in self.record.sites.items():
            stats.from_activation = stats.from_weight = 0.0
            for sample, squares in self.shares.get(name, []):
                kept = squares if whole else squares[:, good[sample]]
                stats.from_activation += float(kept[0].sum())
                stats.from_weight += float(kept[1].sum())

    def _finite(self, outputs: list[Tensor]) -> Tensor:
        """Which samples count: a mask of shape ``[rows]``."""
        good = torch.ones(self.rows, dtype=torch.bool)
        for p in self.effects.values():
            good &= torch.isfinite(p)
        apart = all(len(p) == self.rows for p in self.effects.values()) and all(
            x.dim() > 0 and len(x) % self.rows == 0 for x in outputs
        )
        return good if apart or good.all() else torch.zeros_like(good)


def _joined(known: Tensor | None, effect: Tensor) -> Tensor:
    """The effect of several calls of one site."""
    if known is None:
        return effect
    if len(known) != len(effect):
        known, effect = known.sum()[None], effect.sum()[None]
    return known + effect


@torch.no_grad()
def culprit(loss: Tensor, anchor: Tensor) -> str:
    """The first operator on the way back that makes an infinite gradient of a finite one.

    Args:
        loss: its graph of gradients is still there.
        anchor: where gradients are asked for.

    Returns:
        Its name as autograd knows it, such as ``"sqrt"``; empty if there is none, since it was a
        sum of gradients that overflowed.
    """
    found: list[str] = []
    seen: set[Any] = set()
    stack: list[Any] = [loss.grad_fn]
    handles = []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [each for each, _ in node.next_functions]

        def look(inner: Any, outer: Any, name: str = node.name()) -> None:
            if not found and not _all_finite(inner) and _all_finite(outer):
                found.append(name)

        handles.append(node.register_hook(look))
    torch.autograd.grad(loss, [anchor], allow_unused=True)
    for handle in handles:
        handle.remove()
    words = re.sub(r"Backward\d*$", "", found[0] if found else "")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", words).lower()


def _all_finite(grads: tuple[Tensor | None, ...]) -> bool:
    return all(x is None or bool(torch.isfinite(x).all()) for x in grads)


def _projected(x: Tensor, grad: Tensor, groups: int) -> Tensor:
    """Scalar products of so many equal parts, float64, shape ``[groups]``."""
    products: Tensor = torch.linalg.vecdot(x.reshape(groups, -1), grad.reshape(groups, -1))
    return products.double()
