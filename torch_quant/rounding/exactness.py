"""Scales that were folded into parameters must not change what the float model computes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torch_quant.algorithms.blocks import Block, set_scaled
from torch_quant.core.metrics import sqnr
from torch_quant.core.rounded import Scaling
from torch_quant.errors import InvalidConfig
from torch_quant.graph.twin import twin_of
from torch_quant.rounding.chains import call

__all__ = ["as_it_was", "check_scales", "scale_exactly"]

_EXACT = 70.0
"""dB. Scaling costs a rounding of float32 here and there: some 100 dB and more."""

logger = logging.getLogger("torch_quant")


@contextmanager
def as_it_was(root: nn.Module) -> Iterator[None]:
    """Give every module its own parameters back afterwards."""
    before = {module: dict(module._parameters) for module in root.modules()}
    try:
        yield
    finally:
        for module, parameters in before.items():
            module._parameters.update(parameters)


def scale_exactly(block: Block) -> None:
    """Run the transforms of a block, and undo them if the float block then computes other results.

    Which tensors may be scaled was found on one sample; here all of them are run.
    """
    every = dict.fromkeys(each for layer in block.layers for each in layer.transforms)
    before = {module: dict(module._parameters) for module in block.module.modules()}
    for transform in every:
        transform.scale_block(block, [x for x in block.layers if transform in x.transforms])
    if not block.scaled or _same_results(block, before):
        return
    for module, parameters in before.items():
        module._parameters.update(parameters)
    block.scaled.clear()
    logger.warning(
        "%s: scaled for %s it gives other results on some samples, as a part that not all of them "
        "reach reads a scaled tensor; its weights are rounded without scales",
        block.path or "outside of blocks",
        ", ".join(map(str, every)),
    )


def _same_results(block: Block, before: Mapping[nn.Module, dict[str, Any]]) -> bool:
    """Whether the float block with scales gives what it gives without, on every sample."""
    with torch.no_grad(), as_it_was(block.module):
        for module, parameters in before.items():
            module._parameters.update(parameters)
        exact = list(block.outputs())
        for path, how in block.scaled.items():
            set_scaled(block.module, path, how)
        return all(sqnr(a, b) > _EXACT for a, b in zip(exact, block.outputs(), strict=True))


@torch.no_grad()
def check_scales(model: nn.Module, scaled: Mapping[str, Scaling], batches: Sequence[Any]) -> None:
    """Compare the float model with itself, scaled.

    Raises:
        InvalidConfig: they differ, since something outside of a block reads a scaled parameter too.
    """
    if not scaled:
        return
    plain, twin = twin_of(model), twin_of(model)
    for name, how in scaled.items():
        set_scaled(twin, name, how)
    for i, batch in enumerate(batches):
        found = sqnr(call(plain, batch), call(twin, batch))
        if not found > _EXACT - 10.0:
            raise InvalidConfig(
                f"with scales folded into {next(iter(scaled))} and others, the float model gives "
                f"other results ({found:.0f} dB on batch {i}): code outside of the blocks reads "
                "one of these parameters too. Nothing was rounded; leave AWQ and TEQ out"
            )
