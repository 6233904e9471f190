"""How much of a model runs quantized, in which formats, and why the rest does not."""

from __future__ import annotations

from dataclasses import dataclass

from torch_quant.core.plan import PRECISIONS, FloatOp, QuantPlan, SitePlan
from torch_quant.model import CapturedModel
from torch_quant.report.tables import html_page_table

__all__ = ["Coverage"]

NEVER = "no call has reached it"


@dataclass(frozen=True)
class Coverage:
    """The plan as a report; ``print`` it.

    Args:
        plan: what is quantized.
        backend: for which backend.
        glue: (module, reason) of what is not captured as a graph and runs in Python, or was not
            called, so that no share counts it.
        rows: how many float sites the table lists.
    """

    plan: QuantPlan
    backend: str
    glue: tuple[tuple[str, str], ...] = ()
    rows: int = 20

    @classmethod
    def of(cls, captured: CapturedModel, plan: QuantPlan, backend: str) -> Coverage:
        """The report of a captured model under ``plan``."""
        glue = [(r.path or "(root)", r.failure) for r in captured.root.walk() if r.failure]
        never = [(path, NEVER) for path in (*captured.unreached, *captured.unread())]
        return cls(plan, backend, tuple(glue + never))

    @property
    def share(self) -> float:
        """Share of the multiply-accumulates that run quantized, 0 to 1."""
        return self.plan.coverage

    @property
    def float_ops(self) -> tuple[FloatOp, ...]:
        """What multiplies and is no site: in graphs, and in the Python code between them."""
        return self.plan.float_ops

    @property
    def reasons(self) -> dict[str, str]:
        """Site or operator -> why it stays in float."""
        return {left.name: left.reason for left in self._left()}

    def by_op(self) -> list[dict[str, object]]:
        """A row for each op type: how often, how many quantized and as what, share of the work."""
        total = self.plan.macs or 1
        found: list[SitePlan | FloatOp] = [*self.plan.values(), *self.float_ops]
        rows = []
        for op in dict.fromkeys(each.op for each in found):
            sites = [site for site in self.plan.values() if site.op == op]
            quantized = [site for site in sites if site.quantized]
            lower = [x.precision for x in sites if x.precision != PRECISIONS[0]]
            macs = sum(each.macs for each in found if each.op == op)
            rows.append(
                {
                    "op": op,
                    "sites": len(sites),
                    "quantized": len(quantized),
                    "no sites": sum(each.op == op for each in self.float_ops),
                    "share of MACs": f"{macs / total:.1%}",
                    "of which quantized": f"{sum(s.macs for s in quantized) / macs:.1%}"
                    if macs
                    else "",
                    "format": "; ".join(
                        dict.fromkeys([*(site.format for site in quantized), *lower])
                    ),
                }
            )
        if not self.float_ops:
            for row in rows:
                del row["no sites"]
        return rows

    def _not_counted(self) -> str:
        """What the shares know nothing of, for the headline."""
        never = [path for path, why in self.glue if why == NEVER]
        rest = f" and {len(never) - 3} more" if len(never) > 3 else ""
        names = f"{', '.join(never[:3])}{rest}"
        return f"; not counted: {names}, which no call has reached" if never else ""

    def _left(self) -> list[SitePlan | FloatOp]:
        sites = [site for site in self.plan.values() if not site.quantized]
        return sorted([*sites, *self.float_ops], key=lambda each: -each.macs)

    def _left_rows(self) -> list[dict[str, object]]:
        """A row for each site and operator in float, those with most work first."""
        total = self.plan.macs or 1

        def share(left: SitePlan | FloatOp) -> str:
            known = left.macs or isinstance(left, SitePlan)
            return f"{left.macs / total:.1%}" if known else "?"

        def why(left: SitePlan | FloatOp) -> str:
            if isinstance(left, SitePlan) and left.precision != PRECISIONS[0]:
                return f"{left.reason}, in {left.precision}"
            return left.reason

        return [
            {"not quantized": left.name, "op": left.op, "share": share(left), "why": why(left)}
            for left in self._left()
        ]

    @property
    def _headline(self) -> str:
        return f"{self.backend}: {self.plan.summary}{self._not_counted()}"

    def _repr_html_(self) -> str:
        glue = [{"not captured as a graph": name, "why": why} for name, why in self.glue]
        return html_page_table(self._headline, "", self.by_op(), self._left_rows(), glue)

    def __str__(self) -> str:
        from tabulate import tabulate

        parts = [self._headline, tabulate(self.by_op(), headers="keys")]
        rows = self._left_rows()
        if rows:
            parts.append(tabulate(rows[: self.rows], headers="keys"))
        if len(rows) > self.rows:
            parts.append(f"... and {len(rows) - self.rows} more")
        if self.glue:
            parts.append("Not captured as graphs; what multiplies there is in float:")
            headers = ("module", "why")
            parts.append(tabulate(self.glue, headers=headers, maxcolwidths=[None, 100]))
        return "\n\n".join(parts)
