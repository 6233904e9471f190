"""A hook of mkdocs: the files at the repository's top as pages, and links as the site has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

TOP = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
"""A file at the top -> the page that it becomes."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages; they lie beside the others, so links into ``docs/`` lose that."""
    for name, page in PAGES.items():
        text = (TOP / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=_linked(text, "")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links of a page to files at the top lead to their pages."""
    return _linked(markdown, r"\.\./")


def _linked(text: str, prefix: str) -> str:
    for name, page in PAGES.items():
        text = re.sub(rf"\]\({prefix}{re.escape(name)}", f"]({page}", text)
    return text
