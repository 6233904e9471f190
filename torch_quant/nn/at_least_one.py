"""The parameters of a module whose weights may all be integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["AtLeastOne"]


@dataclass
class AtLeastOne:
    """The ``parameters`` of a module whose weights may all be integers.

    Code asks ``next(self.parameters())`` for dtype and device.
    """

    module: nn.Module

    def __call__(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        found = list(nn.Module.parameters(self.module, recurse))
        yield from found
        if not found:
            device = next((x.device for x in self.module.buffers()), torch.device("cpu"))
            yield nn.Parameter(torch.empty(0, device=device), requires_grad=False)
