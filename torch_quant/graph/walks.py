"""Python code that goes through all parameters or buffers of a part of the model, and is told so.

A quantized model has integers where the float model has weights, so what such code counts or
computes is another thing there. What asks the first parameter for its dtype or device is fine.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_quant.graph.capture import CapturedModule

__all__ = ["walked"]

logger = logging.getLogger("torch_quant")

_MODULE = nn.modules.module.__file__
_OWN = tuple(f"{Path(f).parent}{os.sep}" for f in (torch.__file__, Path(__file__).parent))
_MEMBERS = "_named_members"
"""The function in which ``named_parameters`` and ``named_buffers`` go from module to module."""


def walked(
    submodule: CapturedModule, modules: Iterator[tuple[str, nn.Module]]
) -> Iterator[tuple[str, nn.Module]]:
    """``modules``, and a warning if code asks for parameters or buffers behind the first.

    Args:
        submodule: what the code is around of.
        modules: its ``named_modules()``.
    """
    given: list[nn.Module] = []
    for name, module in modules:
        _tell(submodule, given)
        yield name, module
        given.append(module)
    _tell(submodule, given)


def _tell(submodule: CapturedModule, given: list[nn.Module]) -> None:
    place = _place(given)
    if place and place not in submodule.walks:
        submodule.walks.add(place)
        logger.warning(
            "%s goes through all parameters or buffers of a part of the model while it runs. A "
            "quantized model has other ones, integers among them: where the result depends on that "
            "(here the part is %s), keep that part in float by an override",
            place,
            submodule.path or "the model",
        )


def _place(given: list[nn.Module]) -> str:
    """File and line of the code that was given members of these and asks for more; else nothing."""
    frame: Any = sys._getframe(2)
    members = None
    while frame is not None and frame.f_code.co_filename in (_MODULE, __file__, _EXECUTOR):
        if frame.f_code.co_name == _MEMBERS:
            members = frame.f_locals.get("get_members_fn")
        frame = frame.f_back
    if frame is None or members is None or not any(True for x in given for _ in members(x)):
        return ""
    file = frame.f_code.co_filename
    return "" if file.startswith(_OWN) else f"{file}:{frame.f_lineno}"


_EXECUTOR = str(Path(__file__).with_name("executor.py"))
