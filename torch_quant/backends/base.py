"""What a backend is: where it wants quantization, and how it lowers a quantized graph."""

from __future__ import annotations

from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import Tensor, fx

from torch_quant.core.plan import Placement
from torch_quant.errors import BackendUnavailable, InvalidConfig
from torch_quant.passes.base import PassContext

__all__ = ["Backend", "available_backends", "best_backend", "register_backend", "usable_backend"]

_REGISTRY: dict[str, Backend] = {}
T = TypeVar("T", bound="type[Backend]")


class _ByName(ABCMeta):
    """Makes ``Backend.ONEDNN`` the registered backend of that name."""

    def __getattr__(cls, name: str) -> Backend:
        if name.startswith("_") or not name.isupper():
            raise AttributeError(name)
        return Backend.of(name)


class Backend(ABC, metaclass=_ByName):
    """A runtime. ``Backend.REFERENCE``, ``Backend.ONEDNN`` ... are the registered ones.

    >>> Backend.REFERENCE.name
    'reference'
    """

    name: ClassVar[str]
    priority: ClassVar[int] = 0
    """Of the backends that are available, the one of highest priority is the default."""
    devices: ClassVar[frozenset[str]] = frozenset({"cpu"})
    compiles: ClassVar[bool] = False
    """Whether its kernels come from :meth:`compile`, at the first call of each graph."""

    @abstractmethod
    def unavailable(self) -> str | None:
        """What is missing on this machine and how to get it, or None."""

    @abstractmethod
    def placement(self) -> Placement:
        """Where it wants quantization, on this machine."""

    @abstractmethod
    def lower(self, context: PassContext) -> fx.GraphModule:
        """Put a graph with quantize/dequantize pairs on its kernels.

        Args:
            context: holds the graph, which may be changed.

        Returns:
            A graph that can be called, copied, traced and exported.
        """

    def compile(self, body: fx.GraphModule, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        """What to call in the place of a lowered graph, if the backend ``compiles``.

        Args:
            body: what :meth:`lower` made.
            tensors: the inputs of its first call.
        """
        return body

    def record(self, body: fx.GraphModule, tensors: tuple[Tensor, ...]) -> Any:
        """Run a lowered graph while ``torch.jit.trace`` records it."""
        return body(*tensors)

    def verify(self, *args: Any, **kwargs: Any) -> Any:
        """What runs in int8, read from a runtime that decides that itself.

        Raises:
            InvalidConfig: the backend calls its kernels itself, so there is nothing to ask.
        """
        raise InvalidConfig(
            f"{self!r} runs every kernel that the plan names, so there is nothing to verify: "
            "print(quantizer.coverage(model)) lists them"
        )

    @staticmethod
    def of(name: str | Backend) -> Backend:
        """The backend called ``name``; raises :class:`InvalidConfig` listing those there are."""
        if isinstance(name, Backend):
            return name
        found = _REGISTRY.get(str(name).lower())
        if found is None:
            raise InvalidConfig(
                f"unknown backend {name!r}; expected one of "
                f"{', '.join(f'Backend.{known.upper()}' for known in _REGISTRY)}"
            )
        return found

    def __repr__(self) -> str:
        return f"Backend.{self.name.upper()}"


def register_backend(cls: T) -> T:
    """Class decorator: make the backend known by its name."""
    _REGISTRY[cls.name] = cls()
    return cls


def available_backends() -> list[Backend]:
    """The backends that run on this machine, best first."""
    usable = [backend for backend in _REGISTRY.values() if backend.unavailable() is None]
    return sorted(usable, key=lambda backend: -backend.priority)


def best_backend() -> Backend:
    """The fastest backend that needs nothing more than this machine has."""
    return available_backends()[0]


def usable_backend(backend: Backend | str | None) -> Backend:
    """The backend meant, None for the best; raises :class:`BackendUnavailable` if not on here."""
    chosen = best_backend() if backend is None else Backend.of(backend)
    if reason := chosen.unavailable():
        raise BackendUnavailable(f"{chosen!r} does not run here: {reason}")
    return chosen
