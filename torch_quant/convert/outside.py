"""Where ``torch.compile`` leaves off: imported by compiled code alone, since Dynamo takes long."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["outside"]


@torch.compiler.disable(reason="the graph runs in a runtime outside of PyTorch")  # type: ignore[untyped-decorator]
def outside(graph: nn.Module, tensors: tuple[torch.Tensor, ...]) -> Any:
    """The outputs of a graph that a runtime computes; what is compiled goes on behind it."""
    return graph._run(*tensors)  # type: ignore[operator]
