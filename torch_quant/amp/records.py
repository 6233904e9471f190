"""Sums over the data that an AMP proxy has seen: a few numbers for each site."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field

from torch_quant.amp.gram import NoiseGram
from torch_quant.errors import QuantError

__all__ = ["CandidateStats", "Recorder", "SiteStats", "choice_key"]


def choice_key(site: str, candidate: str) -> str:
    """What a candidate of a site is called in a :class:`NoiseGram`; the plan has no name.

    >>> choice_key("head", ""), choice_key("head", "per token")
    ('head', 'head as per token')
    """
    return f"{site} as {candidate}" if candidate else site


@dataclass
class SiteStats:
    """Of one site, summed over samples.

    Args:
        signal: squared norm of the float result.
        noise: squared norm of what quantizing this site alone adds to it.
        from_activation: the part of the error due to quantized activations, on some samples.
        from_weight: the part due to the quantized weight, on the same samples.
        reached: whether a gradient ever arrived.
    """

    signal: float = 0.0
    noise: float = 0.0
    from_activation: float = 0.0
    from_weight: float = 0.0
    reached: bool = False

    def add(self, other: SiteStats) -> None:
        self.signal += other.signal
        self.noise += other.noise
        self.from_activation += other.from_activation
        self.from_weight += other.from_weight
        self.reached |= other.reached

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for value in astuple(self))


@dataclass
class CandidateStats:
    """Of one site in another format, summed over samples.

    Args:
        score: energy of its noise at the outputs.
        noise: squared norm of its noise at the site's result.
    """

    score: float = 0.0
    noise: float = 0.0

    def add(self, other: CandidateStats) -> None:
        self.score += other.score
        self.noise += other.noise


@dataclass
class Recorder:
    """What a proxy has recorded; a batch counts whole or not at all.

    Args:
        sites: by name.
        gram: their noise at the outputs (or in the loss).
        output_signal: squared norm of all float outputs.
        batches: how many.
        left_out: samples that are not in ``gram`` and ``output_signal``, since a gradient of theirs
            is not finite.
        culprit: the operator that made the first of them; empty if not known.
        candidates: site and candidate -> its noise at the outputs, and locally.
        joint: the same of sites and candidates together, each as :func:`choice_key` calls it; None
            where nobody asks for it.
    """

    sites: dict[str, SiteStats] = field(default_factory=dict)
    gram: NoiseGram = field(default_factory=NoiseGram)
    output_signal: float = 0.0
    batches: int = 0
    left_out: int = 0
    culprit: str = ""
    candidates: dict[tuple[str, str], CandidateStats] = field(default_factory=dict)
    joint: NoiseGram | None = None

    @property
    def without_gradient(self) -> bool:
        """Whether every sample was left out, so that only local noise is known."""
        return self.left_out > 0 and self.gram.draws == 0

    @property
    def cause(self) -> str:
        """Why samples were left out."""
        of = f" of {self.culprit}" if self.culprit else ""
        return f"the gradient{of} is not finite"

    @contextlib.contextmanager
    def batch(self) -> Iterator[Recorder]:
        """Yields the record of one batch, which is added when all went well.

        Raises:
            QuantError: a number is NaN or infinite; names the site.
        """
        new = Recorder(joint=None if self.joint is None else NoiseGram())
        yield new
        for name, stats in new.sites.items():
            score = new.gram.of_site(name)
            if not stats.finite or not math.isfinite(score):
                raise QuantError(
                    f"batch {self.batches}: the sensitivity of {name} is not finite (signal "
                    f"{stats.signal:.3g}, noise {stats.noise:.3g}, score {score:.3g}); look "
                    "for NaN, inf or overflow in the model at that place, or in the inputs. "
                    "Nothing of this batch was recorded"
                )
        # Shares of local noise are another measure than those of noise at the outputs.
        if new.without_gradient and self.gram.draws:
            new.drop_shares()
        elif new.gram.draws and self.without_gradient:
            self.drop_shares()
        for name, stats in new.sites.items():
            self.sites.setdefault(name, SiteStats()).add(stats)
        for key, cost in new.candidates.items():
            if not math.isfinite(cost.score) or not math.isfinite(cost.noise):
                raise QuantError(
                    f"batch {self.batches}: the noise of {key[0]} as {key[1]} is not finite; "
                    "nothing of this batch was recorded"
                )
        for key, cost in new.candidates.items():
            self.candidates.setdefault(key, CandidateStats()).add(cost)
        self.gram.add(new.gram)
        if self.joint is not None and new.joint is not None:
            self.joint.add(new.joint)
        self.output_signal += new.output_signal
        self.batches += 1
        self.left_out += new.left_out
        self.culprit = self.culprit or new.culprit

    def drop_shares(self) -> None:
        """Forget what is due to weights and what to activations."""
        for stats in self.sites.values():
            stats.from_weight = stats.from_activation = 0.0

    def of(self, name: str) -> SiteStats:
        """The site's sums, new if need be."""
        return self.sites.setdefault(name, SiteStats())
