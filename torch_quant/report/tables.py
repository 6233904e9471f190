"""Tables for notebooks."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["html_page_table", "html_table"]


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
