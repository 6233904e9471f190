"""Tiny ``transformers`` models with random weights, by name: no network, no files.

from zoo import ZOO, samples

entry = ZOO["bert"]
model = entry.build()
for sample in samples("bert", 8):
    model(**sample)
model(**entry.inputs(3))
"""

from __future__ import annotations

from typing import Any

from torch import nn
from zoo_audio import AUDIO, MULTIMODAL
from zoo_base import ZooEntry
from zoo_text import TEXT
from zoo_vision import VISION

__all__ = ["ZOO", "ZooEntry", "samples", "zoo_model"]

ZOO: dict[str, ZooEntry] = {e.name: e for e in [*TEXT, *VISION, *AUDIO, *MULTIMODAL]}


def zoo_model(name: str) -> nn.Module:
    """A new model of that name; the same weights each time, eval mode."""
    return ZOO[name].build()


def samples(name: str, count: int) -> list[dict[str, Any]]:
    """``count`` inputs of batch 1, all different: one alone rarely shows the ranges of others."""
    batch = ZOO[name].inputs(count)
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(count)]
