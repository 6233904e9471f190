"""Pooling windows that are larger than the image, of which Inductor walks through every pixel."""

from __future__ import annotations

from typing import Any

import torch

from torch_quant.ops.arguments import argument, set_arguments
from torch_quant.ops.table import spread

__all__ = ["narrow_windows"]


def narrow_windows(exported: Any) -> int:
    """Means over a whole image, however large its window is: the mean is over what lies inside.

    Transformers' EfficientNet pools an image of 7 x 7 pixels by a window of 1280 x 1280.

    Args:
        exported: a program; its graph is changed where sizes are numbers.
    """
    changed = 0
    for node in exported.graph.find_nodes(
        op="call_function", target=torch.ops.aten.avg_pool2d.default
    ):
        image = argument(node, "self").meta["val"].shape[-2:]
        kernel = spread(argument(node, "kernel_size"), 2)
        fixed = all(isinstance(size, int) for size in image)
        if not fixed or any(spread(argument(node, "padding"), 2)):
            continue
        if not argument(node, "ceil_mode") or all(
            k <= n for k, n in zip(kernel, image, strict=True)
        ):
            continue
        stride = spread(argument(node, "stride") or kernel, 2)
        narrow = [min(k, n) for k, n in zip(kernel, image, strict=True)]
        set_arguments(node, {"kernel_size": narrow, "stride": stride})
        changed += 1
    return changed
