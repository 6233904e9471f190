"""Tables for notebooks and terminals."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["PADDED", "folded", "html_page_table", "html_table", "name_table"]

PADDED = "some of the inputs is padding, and what is given there counts in SQNR too"


_WIDE = 1000
"""Columns where there is no terminal: nothing is folded in files and pipes."""


def name_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A table that begins with names, which are never cut: on a terminal they go on a next line.

    Args:
        rows: of text, one at least; the first column has the names.

    >>> print(name_table([{"layer": "encoder.layer.0", "op": "linear"}]))
    layer            op
    ---------------  ------
    encoder.layer.0  linear
    """
    from tabulate import tabulate

    first, *others = rows[0]
    taken = sum(2 + max(len(name) + 2, *(len(row[name]) for row in rows)) for name in others)
    width = shutil.get_terminal_size((_WIDE, 24)).columns
    most = max(width - taken, 20)
    shown = [{**row, first: folded(row[first], most)} for row in rows]
    return str(tabulate(shown, headers="keys", disable_numparse=True))


def folded(name: str, most: int) -> str:
    """A name in lines of at most so many columns where its parts allow it.

    >>> folded("encoder.layer.0.attention", 12)
    'encoder.\\n  layer.0.\\n  attention'
    """
    if len(name) <= most:
        return name
    lines = [""]
    for part in re.findall(r"[^.]*\.|[^.]+", name):
        if lines[-1].strip() and len(lines[-1]) + len(part) > most:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table whose cells are escaped.

    >>> html_table([{"layer": "<b>", "dB": 3}])  # doctest: +ELLIPSIS
    '<table>...&lt;b&gt;...</table>'
    """
    from tabulate import tabulate

    return str(tabulate(rows, headers="keys", tablefmt="html", disable_numparse=True))


def html_page_table(title: str, text: str, *tables: Sequence[Mapping[str, Any]]) -> str:
    """A headline, a paragraph, and tables that have rows.

    >>> html_page_table("a < b", "")
    '<div><b>a &lt; b</b></div>'
    """
    parts = [f"<div><b>{html.escape(title)}</b></div>"]
    parts += [f"<div>{html.escape(line)}</div>" for line in text.splitlines() if line]
    return "\n".join([*parts, *(html_table(rows) for rows in tables if rows)])
