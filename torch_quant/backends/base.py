"""What a backend is: what it can run quantized, and how it lowers a quantized graph."""

from __future__ import annotations

import os
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, fx, nn

from torch_quant.core.kernels import Kernel, KernelTable
from torch_quant.core.naming import did_you_mean
from torch_quant.core.plan import QuantPlan
from torch_quant.core.spec import FLOAT
from torch_quant.errors import BackendUnavailable, InvalidConfig
from torch_quant.graph.sites import KEY
from torch_quant.ops.table import OPERATORS
from torch_quant.passes.base import PassContext

if TYPE_CHECKING:  # the types of what is registered, for type checkers and editors
    from torch_quant.backends.blade import DiscBackend
    from torch_quant.backends.inductor import InductorBackend
    from torch_quant.backends.ipex import IPEXBackend
    from torch_quant.backends.onednn import OneDNNBackend
    from torch_quant.backends.onnx import OnnxBackend
    from torch_quant.backends.onnxruntime import OnnxRuntimeBackend
    from torch_quant.backends.openvino import OpenVINOBackend
    from torch_quant.backends.reference import ReferenceBackend
    from torch_quant.convert.quantized_graph import QuantizedGraph

__all__ = [
    "VARIABLE",
    "Backend",
    "Verification",
    "available_backends",
    "backend_of_environment",
    "best_backend",
    "known_backends",
    "register_backend",
    "register_kernel",
    "usable_backend",
]

VARIABLE = "TORCH_QUANT_BACKEND"
"""The environment variable that names the backend of every quantizer."""

_REGISTRY: dict[str, Backend] = {}
_REGISTERED: dict[str, list[Kernel]] = {}
T = TypeVar("T", bound="type[Backend]")


@runtime_checkable
class Verification(Protocol):
    """What a runtime runs in int8 and what not; ``print`` shows it. Each backend has its own."""

    @property
    def complete(self) -> bool:
        """Whether all that is planned in int8 runs in int8."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """What is planned in int8 and does not run there -> why."""


class _ByName(ABCMeta):
    """Makes ``Backend.ONEDNN`` the registered backend of that name."""

    if not TYPE_CHECKING:  # a type checker knows those below and refuses every other name

        def __getattr__(cls, name: str) -> Backend:
            if name.startswith("_") or not name.isupper():
                raise AttributeError(name)
            return Backend.get(name)


class Backend(ABC, metaclass=_ByName):
    """A runtime. Those of this package are ``Backend.ONEDNN`` and its siblings.

    ``Backend.get("name")`` finds them too, and whatever else was registered.

    >>> Backend.REFERENCE.name
    'reference'
    >>> Backend.get("reference") is Backend.REFERENCE
    True
    """

    DISC: ClassVar[DiscBackend]
    ONEDNN: ClassVar[OneDNNBackend]
    INDUCTOR: ClassVar[InductorBackend]
    IPEX: ClassVar[IPEXBackend]
    ONNX: ClassVar[OnnxBackend]
    ONNXRUNTIME: ClassVar[OnnxRuntimeBackend]
    OPENVINO: ClassVar[OpenVINOBackend]
    REFERENCE: ClassVar[ReferenceBackend]

    name: ClassVar[str]
    priority: ClassVar[int] = 0
    """Of the backends that are available, the one of highest priority is the default."""
    devices: ClassVar[frozenset[str]] = frozenset({"cpu"})
    one_graph: ClassVar[bool] = False
    """Whether a model is captured as one graph unless the user says otherwise."""
    compiles: ClassVar[bool] = False
    """Whether its kernels come from :meth:`compile`, at the first call of each graph."""
    fixes_numbers: ClassVar[bool] = True
    """Whether what it compiles serves the numbers among the inputs that it was compiled with."""
    has_kernels: ClassVar[bool] = True
    """Whether it computes with integers, and not in float what those would give."""
    not_recorded: ClassVar[str] = ""
    """Why its graphs cannot be traced, compiled or exported and what to do, if they cannot."""
    frozen: ClassVar[bool] = True
    """Whether its graphs are frozen as TorchScript, unless that would unpack weights."""
    not_in_torchscript: ClassVar[str] = ""
    """Why its graphs cannot be loaded as TorchScript and what to do, if they cannot."""

    @abstractmethod
    def unavailable(self) -> str | None:
        """What is missing on this machine and how to get it, or None.

        >>> Backend.REFERENCE.unavailable() is None
        True
        """

    def kernels(self) -> KernelTable:
        """What it can run quantized on this machine, registered kernels before its own.

        >>> "linear" in {kernel.op for kernel in Backend.ONEDNN.kernels().rows}
        True
        """
        own = self._kernels()
        return replace(own, rows=(*_REGISTERED.get(self.name, ()), *own.rows))

    @abstractmethod
    def _kernels(self) -> KernelTable:
        """Its own kernels."""

    def lower(self, context: PassContext) -> fx.GraphModule:
        """Put a graph with quantize/dequantize pairs on its kernels; by default, site by site.

        Args:
            context: holds the graph, which may be changed.

        Returns:
            A graph that can be called, copied, traced and exported.

        >>> gm = fx.symbolic_trace(nn.ReLU())  # nothing in it is to be quantized
        >>> Backend.REFERENCE.lower(PassContext(gm)) is gm
        True
        """
        self.emit(context)
        return context.gm

    def emit(self, context: PassContext) -> int:
        """Put kernels that know how in the place of the sites that are quantized; how many.

        >>> Backend.REFERENCE.emit(PassContext(fx.symbolic_trace(nn.ReLU())))
        0
        """
        kernels, changed = self.kernels(), 0
        if all(kernel.emit is None for kernel in kernels.rows):
            return 0
        for node in list(context.graph.nodes):
            entry = context.plan.get(node.meta.get(KEY, ""))
            if node.op != "call_function" or entry is None or not entry.quantized:
                continue
            if node.target is torch.ops.aten.to.dtype:  # it has the key of what it casts
                continue
            activation = entry.activation or (FLOAT if entry.inputs else None)
            weighted = OPERATORS[entry.op].weight is not None
            weight = entry.weight or (FLOAT if weighted else None)
            kernel, _ = kernels.choose(entry.op, activation, weight)
            if kernel is not None and kernel.emit is not None:
                kernel.emit(context, node)
                changed += 1
        return changed

    def compile(self, graph: QuantizedGraph, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        """What to call in the place of a lowered graph's body, if the backend ``compiles``.

        Args:
            graph: its ``body`` is what :meth:`lower` made, its ``contract`` the sizes it serves.
            tensors: the inputs of its first call.

        >>> from torch_quant import Quantizer
        >>> quantizer, model, x = Quantizer("reference"), nn.Linear(4, 2), torch.ones(8, 4)
        >>> _ = quantizer.calib(model)(x)
        >>> (graph,) = quantizer.quantize(model).graphs
        >>> Backend.REFERENCE.compile(graph, (x,)) is graph.body
        True
        """
        return graph.body

    @property
    def has_options(self) -> bool:
        """Whether it was made with options without which it would give other numbers.

        >>> Backend.REFERENCE.has_options
        False
        """
        return _REGISTRY.get(self.name) is not self

    def record(self, body: fx.GraphModule, tensors: tuple[Tensor, ...]) -> Any:
        """Run a lowered graph while ``torch.jit.trace`` records it.

        >>> Backend.REFERENCE.record(fx.symbolic_trace(nn.ReLU()), (Tensor([-1.0, 2.0]),))
        tensor([0., 2.])
        """
        return body(*tensors)

    def verify(
        self,
        subject: nn.Module | str | os.PathLike[str],
        example_inputs: Any = None,
        *,
        plan: QuantPlan | None = None,
    ) -> Verification:
        """What runs in int8, read from a runtime that decides that itself.

        Args:
            subject: the quantized model, or the exported file: what the runtime is given.
            example_inputs: to run a model with, as for :meth:`Quantizer.calib`.
            plan: the quantizer's, where ``subject`` does not hold it.

        Raises:
            InvalidConfig: the backend calls its kernels itself, so there is nothing to ask; or
                ``subject`` is not what it can read.

        >>> Backend.REFERENCE.verify(nn.Linear(4, 2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        torch_quant.errors.InvalidConfig: Backend.REFERENCE runs every kernel that the plan names...
        """
        raise InvalidConfig(
            f"{self!r} runs every kernel that the plan names, so there is nothing to verify: "
            "print(quantizer.coverage(model)) lists them"
        )

    @staticmethod
    def get(name: str | Backend) -> Backend:
        """The backend called ``name``, whoever registered it.

        Raises:
            InvalidConfig: there is none; lists those there are.

        >>> Backend.get("onednn")
        Backend.ONEDNN
        """
        if isinstance(name, Backend):
            return name
        found = _REGISTRY.get(str(name).lower())
        if found is None:
            names = [f"Backend.{known.upper()}" for known in _REGISTRY]
            raise InvalidConfig(
                f"unknown backend {name!r}; expected one of {', '.join(names)}"
                f"{did_you_mean(str(name).lower(), _REGISTRY)}"
            )
        return found

    def __repr__(self) -> str:
        return f"Backend.{self.name.upper()}"


def register_kernel(backend: str, kernel: Kernel) -> None:
    """Give a backend another kernel, which goes before those that it has.

    Args:
        backend: its name.
        kernel: the row; its ``emit`` is called where the backend lowers site by site.

    Raises:
        InvalidConfig: there is no such backend.
    """
    rows = _REGISTERED.setdefault(Backend.get(backend).name, [])
    rows.insert(0, kernel)


def register_backend(cls: T) -> T:
    """Class decorator: make the backend known by its name.

    It is then ``Quantizer(backend="name")`` and ``Backend.get("name")``.
    """
    _REGISTRY[cls.name] = cls()
    return cls


def available_backends() -> list[Backend]:
    """The backends that run on this machine, best first.

    >>> Backend.REFERENCE in available_backends()
    True
    """
    usable = [backend for backend in _REGISTRY.values() if backend.unavailable() is None]
    return sorted(usable, key=lambda backend: -backend.priority)


def known_backends() -> list[Backend]:
    """Every backend that is registered, whether it runs on this machine or not, best first.

    >>> set(available_backends()) <= set(known_backends())
    True
    """
    return sorted(_REGISTRY.values(), key=lambda backend: -backend.priority)


def best_backend() -> Backend:
    """The default: of the backends that this machine has, the one of highest priority."""
    return available_backends()[0]


def backend_of_environment() -> Backend | None:
    """The backend that the variable ``TORCH_QUANT_BACKEND`` names, None if it is not set.

    Raises:
        InvalidConfig: it names none.
        BackendUnavailable: that backend does not run on this machine.
    """
    name = os.environ.get(VARIABLE, "").strip()
    if not name:
        return None
    try:
        return usable_backend(name)
    except (InvalidConfig, BackendUnavailable) as error:
        raise type(error)(f"the environment variable {VARIABLE}: {error}") from error


def usable_backend(backend: Backend | str | None) -> Backend:
    """The backend meant, None for the best; raises :class:`BackendUnavailable` if not on here."""
    chosen = best_backend() if backend is None else Backend.get(backend)
    if reason := chosen.unavailable():
        raise BackendUnavailable(f"{chosen!r} does not run here: {reason}")
    return chosen
