"""Packages that are needed for some things alone."""

from __future__ import annotations

import importlib.util

__all__ = ["missing_packages"]


def missing_packages(*names: str) -> str | None:
    """How to get those of ``names`` that are not installed, or None.

    >>> missing_packages("torch", "no_such_package")
    'no_such_package missing: pip install no_such_package'
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} missing: pip install {' '.join(missing)}"
