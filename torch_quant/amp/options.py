"""What an AMP proxy is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from torch_quant.amp.padding import Mask
from torch_quant.config import QConfig
from torch_quant.errors import InvalidConfig

__all__ = ["AmpOptions", "LossFn"]

LossFn = Callable[[Any, Any], Tensor]
"""(outputs, batch) -> scalar. ``batch`` is what the proxy was called with: the keywords, the single
positional argument, or the tuple of them."""


@dataclass(frozen=True)
class AmpOptions:
    """What :meth:`Quantizer.amp` was asked for.

    Args:
        metric: ``"output"`` or ``"sqnr"``.
        loss_fn: takes the place of the projection of the outputs.
        max_batches: how many are recorded; None for all.
        seed: of the random signs.
        candidates: name -> other configurations, each tried at every site.
        mask: which positions are real, see :func:`real_positions`.

    Raises:
        InvalidConfig: an unknown metric; a loss with ``"sqnr"``; no batches.
    """

    metric: str = "output"
    loss_fn: LossFn | None = None
    max_batches: int | None = None
    seed: int = 0
    candidates: Mapping[str, QConfig] = field(default_factory=dict)
    mask: Mask | None = None

    def __post_init__(self) -> None:
        if self.metric not in ("output", "sqnr"):
            raise InvalidConfig(f'unknown metric {self.metric!r}; expected "output" or "sqnr"')
        if self.loss_fn is not None and self.metric != "output":
            raise InvalidConfig('a loss_fn needs gradients; metric="sqnr" takes none: drop one')
        if self.mask is not None and not isinstance(self.mask, str) and not callable(self.mask):
            raise InvalidConfig(
                f"mask={self.mask!r}; expected the name of an input, or a function of the batch"
            )
        most = self.max_batches
        if most is not None and most < 1:
            raise InvalidConfig(f"max_batches={most!r}; expected 1 or more, or None for all")
