"""Packages and programs that are needed for some things alone."""

from __future__ import annotations

import importlib.util
import os
import shutil

__all__ = ["missing_compiler", "missing_packages"]


def missing_packages(*names: str) -> str | None:
    """How to get those of ``names`` that are not installed, or None.

    >>> missing_packages("torch", "no_such_package")
    'no_such_package missing: pip install no_such_package'
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} missing: pip install {' '.join(missing)}"


def missing_compiler() -> str | None:
    """How to get the C++ compiler that Inductor calls, or None if it is there."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is not None:
        return None
    return (
        f"it needs a C++ compiler, and there is no {compiler}: install one "
        "(apt-get install g++), or name yours in the environment variable CXX"
    )
