"""One HTML file that needs nothing beside itself."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from torch_quant.report.names import printable

__all__ = ["page"]

_SCRIPTS = ("base.js", "charts.js", "details.js", "layers.js", "start.js")


def page(data: Mapping[str, Any]) -> str:
    """The page of a report.

    The browser may run the script of this file and nothing else, so no name that comes from a
    model becomes code; the script writes names as text.

    Args:
        data: as :class:`ModelReport` has it; ``title`` is the headline.

    >>> "<b>" in page({"title": "<b>"})
    False
    """
    room = files("torch_quant.report") / "web"

    def read(name: str) -> str:
        return (room / name).read_text(encoding="utf-8")

    style, script = read("page.css"), "\n".join(read(name) for name in _SCRIPTS)
    script = f'"use strict";\n(() => {{\n{script}}})();\n'
    values = {
        "title": html.escape(printable(str(data.get("title", ""))), quote=True),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "data": _embedded(data),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], read("page.html"))


def _hash(text: str) -> str:
    """As a content security policy names what may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that can stand in HTML: nothing in it ends the element, or opens another.

    >>> _embedded({"</script>": "&"})
    '{"\\\\u003c/script\\\\u003e":"\\\\u0026"}'
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
