"""All that is known of a quantized model in one place: to look at, to keep, to plot."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch_quant.errors import InvalidConfig
from torch_quant.io.files import checked_target, write_atomically
from torch_quant.report import plots
from torch_quant.report.page import page
from torch_quant.report.tables import html_page_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FORMAT", "ModelReport"]

FORMAT = 1
"""Of the data; grows when an entry changes its meaning."""


class ModelReport:
    """What :meth:`Quantizer.report` found: ``print`` it, open its page, or plot from it.

    Args:
        data: plain values, as JSON has them: ``layers`` in the order they run, ``coverage``,
            ``bytes``, and ``comparison``, ``sensitivity`` and ``speed`` where there are any.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = dict(data)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return dict(self.data)

    def to_html(self) -> str:
        """The page: one file without anything from outside."""
        return page(self.data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page, or the data alone to a path that ends in ``.json``.

        Args:
            path: ``report.html`` or ``report.json``; what is there is replaced.

        Raises:
            InvalidConfig: it is a folder, or may not be written.
        """
        target = checked_report(path)
        text = (
            json.dumps(self.data, indent=1, allow_nan=False) + "\n"
            if target.lower().endswith(".json")
            else self.to_html()
        )

        def write(name: str) -> None:
            with open(name, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)

        write_atomically(target, write)

    def layer(self, name: str) -> dict[str, Any]:
        """What is known of a layer; raises :class:`InvalidConfig` for an unknown name."""
        for each in self.data["layers"]:
            if each["name"] == name:
                return dict(each)
        known = [each["name"] for each in self.data["layers"]]
        raise InvalidConfig(
            f"the report has no layer {name!r}; expected one of {', '.join(known[:8])}"
            + (f" and {len(known) - 8} more" if len(known) > 8 else "")
        )

    def facts(self) -> list[dict[str, str]]:
        """The headline in rows: what, in float, quantized."""
        return plots.facts(self.data)

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = tabulate(self.facts(), headers="keys", disable_numparse=True)
        return f"{self.data['title']} ({self.data['backend']})\n{self.data['summary']}\n\n{rows}"

    def _repr_html_(self) -> str:
        return html_page_table(self.data["title"], self.data["summary"], self.facts())

    # The figures of the page, for notebooks

    def plot_layer(self, name: str, path: str | os.PathLike[str] | None = None) -> Figure:
        """How the values of a layer are distributed, with the grid that they are rounded to.

        Args:
            name: of the layer.
            path: where to save it, ``.png``, ``.svg`` or ``.pdf``; None to only return the figure.

        Raises:
            BackendUnavailable: matplotlib is missing.
            InvalidConfig: no layer is called so, or the path cannot be written.
        """
        return plots.drawn(path, plots.layer, self.layer(name))

    def plot_ranges(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """The range of each quantized activation, in the order the layers run.

        Args:
            path: as for :meth:`plot_layer`.
        """
        return plots.drawn(path, plots.ranges, self.data["layers"])

    def plot_coverage(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """The share of the work that runs quantized, of each part of the model.

        Args:
            path: as for :meth:`plot_layer`.
        """
        return plots.drawn(path, plots.coverage, self.data["layers"])

    def plot_error(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """How far each layer's result is from float, and what each adds.

        Args:
            path: as for :meth:`plot_layer`.

        Raises:
            InvalidConfig: the report was made without ``batches``.
        """
        layers = self._with("error", "follows no error: quantizer.report(..., batches=[...])")
        return plots.drawn(path, plots.error, layers)

    def plot_sensitivity(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """The layers that the outputs bear least.

        Args:
            path: as for :meth:`plot_layer`.

        Raises:
            InvalidConfig: the report was made without ``sensitivity``.
        """
        how = "has no sensitivity: quantizer.report(..., sensitivity=amp_model)"
        return plots.drawn(path, plots.sensitivity, self._with("sensitivity", how))

    def _with(self, part: str, missing: str) -> list[dict[str, Any]]:
        """The layers of which a part is known."""
        layers = [each for each in self.data["layers"] if each[part] is not None]
        if not layers:
            raise InvalidConfig(f"the report {missing}")
        return layers


def checked_report(path: str | os.PathLike[str]) -> str:
    """``path`` if a report can be written there; to be asked before any work.

    Raises:
        InvalidConfig: it is a folder, may not be written, or ends in something else.
    """
    target = str(checked_target(path, "report.html"))
    if not target.lower().endswith((".html", ".htm", ".json")):
        raise InvalidConfig(
            f"cannot write a report to {target}: expected a name that ends in .html, or in .json "
            "for the data alone"
        )
    return target
