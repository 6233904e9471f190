"""What torch's ONNX exporter makes of its operators is kept, since that is half of a small export.

At each export it parses the source of the 500 functions that write operators, which are the same in
every export. Nothing of the model is kept.
"""

from __future__ import annotations

import functools
import sys

__all__ = ["keep_operators"]


def keep_operators() -> None:
    """From now on, if the exporter has been loaded; it is slow to load, and few tests need it."""
    exporter = sys.modules.get("torch.onnx._internal.exporter._registration")
    operators = getattr(exporter, "onnxscript_apis", None)
    if "onnxscript" not in sys.modules or operators is None:
        return
    found = operators.get_torchlib_ops
    if not hasattr(found, "cache_info"):
        operators.get_torchlib_ops = functools.cache(found)
