"""Tiny ``transformers`` models with random weights, by name: no network, no files.

from zoo import ZOO

entry = ZOO["bert"]
entry.build()(**entry.inputs(3))
"""

from __future__ import annotations

from torch import nn
from zoo_audio import AUDIO, MULTIMODAL
from zoo_base import ZooEntry
from zoo_text import TEXT
from zoo_vision import VISION

__all__ = ["ZOO", "ZooEntry", "zoo_model"]

ZOO: dict[str, ZooEntry] = {e.name: e for e in [*TEXT, *VISION, *AUDIO, *MULTIMODAL]}


def zoo_model(name: str) -> nn.Module:
    """A new model of that name; the same weights each time, eval mode."""
    return ZOO[name].build()
