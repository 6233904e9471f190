"""Example inputs: what they stand for, and calls with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from torch_quant.errors import CaptureFailed, InvalidConfig
from torch_quant.graph.capture import CapturedModule, Reopened
from torch_quant.graph.executor import Executor

__all__ = ["call_example", "example_call", "is_padded", "run_example"]


def run_example(root: CapturedModule, example_inputs: Any) -> Any:
    """Capture a model by one call, with ``example_inputs`` as :func:`example_call` reads them.

    Raises:
        CaptureFailed: they do not fit the model.
    """
    try:
        while True:
            executor = Executor(root, lambda submodule, graph, call: graph(call))
            with contextlib.suppress(Reopened):
                return call_example(executor.watched, example_inputs)
    except CaptureFailed as error:
        if not isinstance(example_inputs, list):
            raise
        raise CaptureFailed(
            f"{error}. The example_inputs are a list, which is one input; several are a tuple: "
            "example_inputs=(x, y)"
        ) from error


def is_padded(example_inputs: Any) -> bool:
    """Whether the ``attention_mask`` of a batch by keywords says that some of it is padding.

    >>> is_padded({"attention_mask": torch.tensor([[1, 1], [1, 0]])}), is_padded(torch.ones(2))
    (True, False)
    """
    mask = example_inputs.get("attention_mask") if isinstance(example_inputs, Mapping) else None
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool((mask == 0).any())


def example_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of the call that ``example_inputs`` stand for, the same everywhere.

    A tuple holds the positional inputs, as for ``torch.export.export`` and ``torch.onnx.export``; a
    mapping holds keywords; anything else is the one input. So a list is one input that is a list,
    as detectors take their images, and ``(batch,)`` is one input that may be a dictionary.

    Raises:
        InvalidConfig: the keywords are no strings, or there is no example.

    >>> example_call((1, 2)), example_call([1, 2])
    (((1, 2), {}), (([1, 2],), {}))
    >>> example_call({"x": 1}), example_call(({"x": 1},))
    (((), {'x': 1}), (({'x': 1},), {}))
    """
    if example_inputs is None:
        raise InvalidConfig(
            "example_inputs is None; give a tensor, a tuple of positional inputs or a dict of "
            "keywords"
        )
    if isinstance(example_inputs, Mapping):
        if wrong := [key for key in example_inputs if not isinstance(key, str)]:
            raise InvalidConfig(
                f"example_inputs is a dict, so its keys are the names of inputs, but one is "
                f"{wrong[0]!r}; if the model takes the dict itself, give example_inputs=(batch,)"
            )
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


@torch.no_grad()
def call_example(model: Callable[..., Any], example_inputs: Any) -> Any:
    """Call ``model`` with ``example_inputs`` as :func:`example_call` reads them."""
    args, kwargs = example_call(example_inputs)
    return model(*args, **kwargs)
