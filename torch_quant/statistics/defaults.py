"""Which observer a tensor gets where the user names none."""

from __future__ import annotations

__all__ = ["DEFAULT_OBSERVER"]

DEFAULT_OBSERVER = "minmax"
"""Chosen by measurement, see ``benchmarks/observers.py`` and ``docs/architecture.md``."""
