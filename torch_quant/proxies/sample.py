"""The last calibration batch, by which a quantized model is looked at once before it is handed out.

It is kept where it is small, of models that are one graph without state. The quantized model runs
on it where that takes no compiler: one call, a small part of what calibration took. Only where the
outputs have little to do with float's does more happen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant.core.metrics import sqnr
from torch_quant.errors import QuantError
from torch_quant.graph.capture import CapturedModule
from torch_quant.proxies.values import copied, projected

__all__ = ["LEAST_SQNR", "Sample", "collapse"]

logger = logging.getLogger("torch_quant")

LEAST_SQNR = 10.0
"""dB of the outputs below which a model is said to have collapsed."""
BUDGET = 16 * 2**20
"""Bytes of inputs and outputs that are kept at most."""


@dataclass(frozen=True)
class Sample:
    """A batch and what float made of it.

    Args:
        args: copies of the positional arguments.
        kwargs: of the others.
        outputs: copies of the float tensors among the outputs.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: list[Tensor]

    @classmethod
    def before(
        cls, submodule: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        """Copies of the inputs of a call that may be kept; None for one that is not.

        Args:
            submodule: what is called.
            args: with these.
            kwargs: and these.
        """
        whole = not (submodule.path or submodule.failure or submodule.plain or submodule.by_choice)
        if not whole or _bytes((args, kwargs)) > BUDGET:
            return None
        return copied((args, kwargs))  # type: ignore[no-any-return]

    @classmethod
    def of(cls, inputs: tuple[Any, Any] | None, outputs: Any) -> Sample | None:
        """What is kept of the call; None where that would be too much, or there is nothing."""
        if inputs is None or _bytes((inputs, outputs)) > BUDGET:
            return None
        found = [x.detach().clone() for x in projected(outputs)]
        return cls(*inputs, found) if found else None

    def of_model(self, model: Callable[..., Any]) -> list[Tensor]:
        """The float tensors that ``model`` gives for it; the random state stays as it is."""
        args, kwargs = copied((self.args, self.kwargs))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return projected(model(*args, **kwargs))


def _bytes(values: Any) -> int:
    tensors = (x for x in pytree.tree_leaves(values) if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in tensors)


def collapse(sample: Sample, model: nn.Module, quant_model: Callable[..., Any]) -> float | None:
    """The SQNR of the outputs in dB where it is below :data:`LEAST_SQNR`, else None.

    It is None too where the float model gives something else than it did, as its weights have
    changed, say, or it draws random numbers.

    Args:
        sample: the last calibration batch.
        model: the float model.
        quant_model: what was made of it.
    """
    try:
        found = sqnr(sample.outputs, sample.of_model(quant_model))
        if not found < LEAST_SQNR or model.training:
            return None
        return found if sqnr(sample.outputs, sample.of_model(model)) > 60.0 else None
    except QuantError as error:  # a call of the user's will tell
        logger.debug("the last calibration batch says nothing: %s", error)
        return None
