"""Where the error of a quantized model comes in: layer by layer, in the order they run."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from torch_quant.report.names import decibels
from torch_quant.report.tables import PADDED, html_page_table, name_table

__all__ = ["Comparison", "LayerError"]

_WORST = 3


@dataclass(frozen=True)
class LayerError:
    """How far the result of one site is from float, with everything before it quantized too.

    Args:
        site: its name.
        op: its op type.
        format: what its numbers are, ``"float32"`` if it is not quantized.
        before: SQNR of what it is given, the worst of its inputs, in dB; ``inf`` where nothing was
            quantized before.
        after: SQNR of its result, in dB; ``inf`` where it is equal, ``-inf`` where float gives 0
            alone, NaN where it is.
        share: what the site itself adds, of all that the sites add: noise over signal of the result
            beyond that of its inputs; 0 to 1. What is in float adds nothing. The first results that
            are NaN, or have no signal, add all.
    """

    site: str
    op: str
    format: str
    before: float
    after: float
    share: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """What :meth:`Quantizer.compare` found; ``print`` it.

    Args:
        layers: in the order that they run.
        outputs: SQNR of the outputs, on the kernels of the backend, in dB.
        simulated: the same of the same plan in float arithmetic: what lies between is the kernels'.
        backend: where it ran.
        batches: how many.
        unseen: how many sites no call reached, or have no result of their own.
        padded: whether an ``attention_mask`` says that some of the inputs is padding: what the
            layers and the model give there counts too.
    """

    layers: tuple[LayerError, ...]
    outputs: float
    simulated: float
    backend: str
    batches: int
    unseen: int = 0
    padded: bool = False

    def __iter__(self) -> Iterator[LayerError]:
        return iter(self.layers)

    @property
    def worst(self) -> tuple[LayerError, ...]:
        """The layers, those that add most first."""
        return tuple(sorted(self.layers, key=lambda each: -each.share))

    def _rows(self) -> list[dict[str, str]]:
        return [
            {
                "layer": each.site,
                "format": each.format.replace(" weights", " w"),
                "before dB": decibels(each.before, ""),
                "after dB": decibels(each.after, ""),
                "adds": f"{each.share:.1%}" if each.share >= 0.0005 else "",
            }
            for each in self.layers
        ]

    def _headline(self) -> list[str]:
        lines = [
            f"outputs on {self.backend}: SQNR {decibels(self.outputs)}",
            f"the same plan in float arithmetic: {decibels(self.simulated)}",
        ]
        return [*lines, PADDED] if self.padded else lines

    def _repr_html_(self) -> str:
        first, *rest = self._headline()
        return html_page_table(first, "\n".join(rest), self._rows())

    def __str__(self) -> str:
        rows, lines = self._rows(), self._headline()
        if rows:
            lines += ["", name_table(rows)]
        most = [each for each in self.worst[:_WORST] if each.share > 0]
        if most:
            names = ", ".join(each.site for each in most)
            lines += ["", *textwrap.wrap(f"most comes in at {names}", 78, subsequent_indent="  ")]
        if self.unseen:
            lines.append(f"{self.unseen} sites have no result of their own, or were not called")
        return "\n".join(lines)
