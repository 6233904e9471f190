"""A griffe extension: docstrings as the site shows them.

Examples become blocks of code, and roles links: ``:class:`QConfig``` to where the site has it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

_PAGES = Path(__file__).parents[1] / "api"
_NAMED = re.compile(r"^::: (torch_quant\.\S+)$", re.M)
_ROLE = re.compile(r":(class|meth|func|data|attr|mod|exc):`~?([^`<]+)`")
_EXAMPLE = re.compile(r"^(>>> .*(?:\n(?!\n|>>>).*|\n>>> .*)*)", re.M)


class Docstrings(griffe.Extension):
    """See above."""

    def __init__(self) -> None:
        pages = [page.read_text(encoding="utf-8") for page in _PAGES.glob("*.md")]
        paths = [path for page in pages for path in _NAMED.findall(page)]
        self._paths = {path.rpartition(".")[2]: path for path in paths}

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite its docstring."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub(r"```pycon\n\1\n```", obj.docstring.value)
            obj.docstring.value = _ROLE.sub(self._link, text)

    def _link(self, found: re.Match[str]) -> str:
        name = found[2]
        first, dot, rest = name.removeprefix("torch_quant.").partition(".")
        path = self._paths.get(first)
        if path is None or (dot and not rest.isidentifier()):
            return f"`{name}`"
        return f"[`{name}`][{path}{dot}{rest}]"
