"""Where operators of this package are defined: ``torch.ops.torch_quant``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["NAMESPACE", "define_operator", "library"]

NAMESPACE = "torch_quant"
library = torch.library.Library(NAMESPACE, "DEF")


def define_operator(
    schema: str,
    compute: Callable[..., Any] | None,
    fake: Callable[..., Any] | None,
    *,
    keys: Sequence[str] = ("CompositeExplicitAutograd",),
) -> Any:
    """Define an operator that graphs can call.

    Args:
        schema: its name, arguments and results: ``"twice(Tensor x) -> Tensor"``.
        compute: what it does; None for one that is only written to files.
        fake: its result on tensors without data, which exporting and compiling ask for; None where
            ``compute`` gives that too.
        keys: dispatch keys that ``compute`` serves: of all devices, by default.

    Returns:
        The overload that graphs call.
    """
    name = schema.partition("(")[0]
    library.define(schema)
    if compute is not None:
        for key in keys:
            library.impl(name, compute, key)
    if fake is not None:
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
