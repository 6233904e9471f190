"""How much of a model runs in int8, and why the rest does not."""

from __future__ import annotations

from dataclasses import dataclass

from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.model import CapturedModel

__all__ = ["Coverage"]


@dataclass(frozen=True)
class Coverage:
    """The plan as a report; ``print`` it.

    Args:
        plan: what is quantized.
        backend: for which backend.
        float_ops: (name, reason) of operators that compute products outside the op table.
        glue: (module, reason) of what is not captured as a graph and runs in Python, or was not
            called.
        rows: how many float sites the table lists.
    """

    plan: QuantPlan
    backend: str
    float_ops: tuple[tuple[str, str], ...] = ()
    glue: tuple[tuple[str, str], ...] = ()
    rows: int = 20

    @classmethod
    def of(cls, captured: CapturedModel, plan: QuantPlan, backend: str) -> Coverage:
        """The report of a captured model under ``plan``."""
        glue = [(r.path or "(root)", r.failure) for r in captured.region.walk() if r.failure]
        never = [(path, "no call has reached it") for path in captured.unreached]
        float_ops = {op for prepared in captured.graphs() for op in prepared.float_ops}
        return cls(plan, backend, tuple(sorted(float_ops)), tuple(glue + never))

    @property
    def share(self) -> float:
        """Share of the captured multiply-accumulates that run in int8, 0 to 1."""
        return self.plan.coverage

    @property
    def reasons(self) -> dict[str, str]:
        """Site or operator -> why it stays in float."""
        left = {site.name: site.reason for site in self.plan.values() if not site.quantized}
        return left | dict(self.float_ops)

    def by_op(self) -> list[dict[str, object]]:
        """A row for each op type: sites, how many in int8, share of all multiply-accumulates."""
        total = sum(site.macs for site in self.plan.values()) or 1
        rows = []
        for op in dict.fromkeys(site.op for site in self.plan.values()):
            sites = [site for site in self.plan.values() if site.op == op]
            int8 = [site for site in sites if site.quantized]
            rows.append(
                {
                    "op": op,
                    "sites": len(sites),
                    "in int8": len(int8),
                    "share of MACs": f"{sum(s.macs for s in sites) / total:.1%}",
                    "of them int8": f"{sum(s.macs for s in int8) / total:.1%}",
                }
            )
        return rows

    def _left(self) -> list[SitePlan]:
        left = [site for site in self.plan.values() if not site.quantized]
        return sorted(left, key=lambda site: -site.macs)

    def __str__(self) -> str:
        from tabulate import tabulate

        total = sum(site.macs for site in self.plan.values()) or 1
        what = "captured multiply-accumulates" if self.glue else "multiply-accumulates"
        parts = [
            f"{self.backend}: {self.share:.1%} of the {what} in int8, "
            f"{len(self.plan.quantized)} of {len(self.plan)} sites",
            tabulate(self.by_op(), headers="keys"),
        ]
        rows = [
            {"left in float": s.name, "op": s.op, "share": f"{s.macs / total:.1%}", "why": s.reason}
            for s in self._left()
        ]
        rows += [
            {"left in float": name, "op": "", "share": "?", "why": why}
            for name, why in self.float_ops
        ]
        if rows:
            parts.append(tabulate(rows[: self.rows], headers="keys"))
        if len(rows) > self.rows:
            parts.append(f"... and {len(rows) - self.rows} more")
        if self.glue:
            parts.append("Not captured, so in float and not counted above:")
            headers = ("module", "why")
            parts.append(tabulate(self.glue, headers=headers, maxcolwidths=[None, 100]))
        return "\n\n".join(parts)
