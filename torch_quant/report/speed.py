"""What a model takes on each backend of this machine, beside float."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch_quant.report.tables import PADDED, html_page_table

__all__ = ["Profile", "Run"]


@dataclass(frozen=True)
class Run:
    """One way to run a model.

    Args:
        name: what it is.
        backend: the backend that it runs on, quantized; None for float.
        median: milliseconds of a call, None where it does not run.
        p90: nine of ten calls take no longer; milliseconds.
        sqnr: of its outputs against float32, in dB; None for float32 itself.
        why_not: why it does not run.
    """

    name: str
    backend: str | None = None
    median: float | None = None
    p90: float | None = None
    sqnr: float | None = None
    why_not: str = ""


@dataclass(frozen=True)
class Profile:
    """What :meth:`Quantizer.profile` measured; ``print`` it.

    Args:
        runs: float32 first.
        threads: of PyTorch, with which it was measured.
        rounds: how often each was called in turn.
        padded: whether an ``attention_mask`` says that some of the inputs is padding: what the
            model gives there counts in ``sqnr`` too.
    """

    runs: tuple[Run, ...]
    threads: int
    rounds: int
    padded: bool = False

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    @property
    def fastest(self) -> str | None:
        """The name of the backend whose quantized model is the fastest; None if none runs."""
        ran = [run for run in self.runs if run.backend is not None and run.median is not None]
        return min(ran, key=lambda run: run.median or 0.0).backend if ran else None

    @property
    def gain(self) -> float:
        """How many times faster the fastest quantized model is than the fastest float one."""
        times: dict[bool, list[float]] = {True: [], False: []}
        for run in self.runs:
            if run.median is not None:
                times[run.backend is None].append(run.median)
        return min(times[True]) / min(times[False]) if times[False] else 0.0

    def _rows(self) -> list[dict[str, str]]:
        float32 = self.runs[0].median
        return [
            {
                "model": run.name,
                "median ms": _number(run.median),
                "p90 ms": _number(run.p90),
                "times float32": "-"
                if run.median is None or float32 is None
                else f"{float32 / run.median:.2f}",
                "SQNR dB": "-" if run.sqnr is None else f"{run.sqnr:.1f}",
            }
            for run in self.runs
        ]

    def _notes(self) -> list[str]:
        lines = [f"{run.name} does not run: {run.why_not}" for run in self.runs if run.why_not]
        lines.append(f"{self.threads} threads, {self.rounds} calls of each in turns")
        return [*lines, PADDED] if self.padded else lines

    def _repr_html_(self) -> str:
        return html_page_table("time of a call", "\n".join(self._notes()), self._rows())

    def __str__(self) -> str:
        from tabulate import tabulate

        table = tabulate(self._rows(), headers="keys", disable_numparse=True)
        return "\n".join([table, *self._notes()])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
