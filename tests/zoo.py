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

from thinning import LONG
from torch import nn
from zoo_audio import AUDIO, MULTIMODAL
from zoo_base import ZooEntry
from zoo_text import TEXT
from zoo_vision import VISION

__all__ = [
    "ARCHITECTURES",
    "DIFFERENT",
    "KINDS",
    "ONE_SIZE",
    "ZOO",
    "ZooEntry",
    "samples",
    "zoo_model",
]

ZOO: dict[str, ZooEntry] = {e.name: e for e in [*TEXT, *VISION, *AUDIO, *MULTIMODAL]}

ONE_SIZE = {
    "funnel": "counts in Python how often the text can be pooled: exported for one length",
    "mobilenet_v2": "computes paddings in Python: exported for one size",
    "vit": "checks the size of images",
    "deit": "checks the size of images",
    "vit_mae": "checks the size of images",
    "beit": "interpolates positions for other sizes, which is other code",
    "dinov2": "interpolates positions for other sizes, which is other code",
    "dinov2_swiglu": "interpolates positions for other sizes, which is other code",
    "mobilevit": "resizes what does not divide into patches, which is other code",
    "levit": "has biases for one size only",
    "audio_spectrogram_transformer": "has positions for one length only",
}
"""Architectures that serve one length or image size only, in float or once exported, and why."""

DIFFERENT = {
    "bert", "deberta", "modernbert", "gpt2", "llama_cache", "mixtral", "resnet", "efficientnet",
    "convnext", "vit", "whisper", "siglip",
}  # fmt: skip
"""For what takes long in every run, as files and compilers do; ``make test-long`` takes all."""

KINDS = DIFFERENT | {
    "funnel", "convbert", "deberta_v2", "fnet", "gemma2", "bloom", "falcon", "mpt", "t5",
    "mobilenet_v1", "beit", "dinov2", "yolos", "vit_mae", "swinv2", "mobilevitv2", "levit", "sew",
    "speech_to_text", "hifigan", "clip",
}  # fmt: skip
"""One of each kind, for every run of what is quicker; operators of the others are those of these,
which ``zoo_operators`` proves.

``make test-long`` takes all.
"""
ARCHITECTURES = [entry for name, entry in ZOO.items() if name in DIFFERENT or LONG]
"""What every run takes, or all."""


def zoo_model(name: str) -> nn.Module:
    """A new model of that name; the same weights each time, eval mode."""
    return ZOO[name].build()


def samples(name: str, count: int) -> list[dict[str, Any]]:
    """``count`` inputs of batch 1, all different: one alone rarely shows the ranges of others."""
    batch = ZOO[name].inputs(count)
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(count)]
