"""The ranking: what each site's error does to the output, worst first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

from torch_quant.amp.gram import NoiseGram

__all__ = ["METRICS", "Ranking", "Sensitivity", "decibels"]

METRICS = {
    "output": "noise that the site adds to the outputs, to first order",
    "loss": "change of the loss, squared, to first order",
    "sqnr": "noise that the site adds to its own result, over its signal",
}
"""What a score says, by metric."""


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; ``inf`` without noise, ``-inf`` without signal."""
    if noise <= 0.0:
        return math.inf
    return -math.inf if signal <= 0.0 else 10.0 * math.log10(signal / noise)


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one site does.

    Args:
        name: the site.
        op: its op type.
        score: by the ranking's metric, summed over the data, the site alone; larger is worse.
        gain: the same, of what its return to float (with its group) removes while all else stays
            quantized: errors of two sites may add up or cancel.
        local_sqnr: signal to noise at the site's own result, dB.
        predicted_output_sqnr: signal to noise at the model's outputs if only this site were
            quantized, dB; None where the metric does not predict it.
        weight_share: share of the score due to the quantized weight, 0 to 1.
        activation_share: the rest, due to quantized activations.
        macs: multiply-accumulates of the captured example.
        bytes: size of its float32 weight; int8 takes a quarter of it.
        together: other sites that fall back with this one.
        shares_input: other sites that read the same quantized tensor: while one of them is in
            int8, the tensor is still quantized for it.
        fallen_back: whether it is in float already.
    """

    name: str
    op: str
    score: float
    gain: float
    local_sqnr: float
    predicted_output_sqnr: float | None
    weight_share: float
    activation_share: float
    macs: int
    bytes: int
    together: tuple[str, ...] = ()
    shares_input: tuple[str, ...] = ()
    fallen_back: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values; infinite decibels as None, which JSON has.

        >>> site = Sensitivity("head", "linear", 0.5, 0.4, 30.0, None, 0.3, 0.7, 8, 8)
        >>> site.to_dict()["score"]
        0.5
        """
        data = asdict(self)
        for name in ("local_sqnr", "predicted_output_sqnr"):
            value = data[name]
            data[name] = value if value is not None and math.isfinite(value) else None
        data["together"], data["shares_input"] = list(self.together), list(self.shares_input)
        return data


class Ranking(Sequence[Sensitivity]):
    """Sensitivities, worst group first, members of a group side by side.

    Args:
        sites: in any order.
        metric: a key of :data:`METRICS`.
        gram: noise of the sites at the outputs, alone and together; None if it is not known.
        output_signal: squared norm of the float outputs, in the units of the scores.
        batches: how many batches they come from.
        note: what a reader must know, such as why another metric was used.
    """

    def __init__(
        self,
        sites: Iterable[Sensitivity],
        metric: str,
        gram: NoiseGram | None = None,
        output_signal: float = math.nan,
        batches: int = 0,
        note: str = "",
    ) -> None:
        by_name = {site.name: site for site in sites}
        self.metric, self.gram, self.output_signal = metric, gram, output_signal
        self.batches, self.note = batches, note
        groups = {tuple(sorted((s.name, *s.together))) for s in by_name.values()}
        ordered = [
            tuple(sorted(names, key=lambda n: (-by_name[n].score, n))) for names in sorted(groups)
        ]
        self.groups: list[tuple[str, ...]] = sorted(
            ordered, key=lambda names: -sum(by_name[n].score for n in names)
        )
        """Names that fall back together, worst first."""
        self._sites = [by_name[name] for names in self.groups for name in names]
        self._by_name = by_name

    @overload
    def __getitem__(self, index: int) -> Sensitivity: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sensitivity]: ...
    def __getitem__(self, index: int | slice) -> Sensitivity | list[Sensitivity]:
        return self._sites[index]

    def __len__(self) -> int:
        return len(self._sites)

    @property
    def names(self) -> list[str]:
        """Site names, worst first."""
        return [site.name for site in self]

    @property
    def left(self) -> list[tuple[str, ...]]:
        """The groups that are not in float yet, worst first."""
        return [names for names in self.groups if not self._by_name[names[0]].fallen_back]

    def noise(self, in_float: Iterable[str] = ()) -> float:
        """What is left of the noise with ``in_float`` in float, in the units of the scores."""
        gone = set(in_float)
        left = [name for name in self._by_name if name not in gone]
        if self.gram is not None:
            return self.gram.noise(left)
        return math.fsum(self._by_name[name].score for name in left)

    def of(self, name: str) -> Sensitivity:
        """One site's entry; raises ``KeyError`` for an unknown name."""
        return self._by_name[name]

    def predicted(self, in_float: Iterable[str] = ()) -> float:
        """Output SQNR, dB, with ``in_float`` in float and everything else quantized.

        NaN where the metric does not tell.
        """
        if self.metric != "output":
            return math.nan
        return decibels(self.output_signal, self.noise(in_float))

    def curve(self) -> list[tuple[int, float]]:
        """(number of worst groups in float, predicted output SQNR in dB), from none to all."""
        gone: list[str] = []
        points = [(0, self.predicted())]
        for count, names in enumerate(self.groups, 1):
            gone += names
            points.append((count, self.predicted(gone)))
        return points

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "metric": self.metric,
            "meaning": METRICS[self.metric],
            "batches": self.batches,
            "note": self.note,
            "sites": [site.to_dict() for site in self],
        }
