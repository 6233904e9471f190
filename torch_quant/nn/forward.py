"""A ``forward`` that shows the signature of another module's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["SignedForward"]


class SignedForward:
    """Calls ``function`` and has ``signature``.

    ``torch.jit.trace(..., example_kwarg_inputs=...)``, ``torch.export`` and whoever passes only the
    arguments that a model takes ask for names.

    Args:
        function: what to call.
        signature: the float module's.
    """

    def __init__(self, function: Callable[..., Any], signature: inspect.Signature) -> None:
        self.function, self.__signature__ = function, signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    @property
    def __code__(self) -> Any:
        """Where the code is, which ``torch.export`` notes."""
        return self.function.__code__
