"""What sequences are made of: settings, calls and how their results are compared."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flows import Inputs
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant import ModuleFilter, QConfig, Quantizer, QuantSpec, recipes
from torch_quant.graph.outputs import flatten_output

__all__ = [
    "FILTERS", "OVERRIDES", "QCONFIGS", "Event", "Options", "Saved", "call", "edit", "plain",
    "run", "same",
]  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What a user may set between two calls, and which summary was loaded last."""

    qconfig: QConfig = field(default_factory=recipes.int8_static)
    overrides: tuple[tuple[str, QConfig | None], ...] = ()
    module_filter: ModuleFilter = field(default_factory=ModuleFilter)
    summary: Path | None = None

    def give(self, quantizer: Quantizer) -> None:
        quantizer.qconfig = self.qconfig
        quantizer.overrides = dict(self.overrides)
        quantizer.module_filter = self.module_filter


@dataclass(frozen=True)
class Event:
    """Something that changed the ranges: a batch, or a summary that was loaded."""

    options: Options
    weights: int
    kind: int = 0
    salt: int = 0
    summary: Path | None = None


@dataclass
class Saved:
    state: dict[str, Any]
    history: tuple[Event, ...]
    fallen: dict[str, str]


QCONFIGS = {
    "default": recipes.int8_static(),
    "fast": recipes.fast(),
    "minmax": QConfig(observer="minmax"),
    "seven bits": QConfig(input=QuantSpec.of(bits=7)),
    "per tensor": QConfig(weight=QuantSpec.of(bits=8, signed=True, symmetric=True)),
}
OVERRIDES: list[tuple[tuple[str, QConfig | None], ...]] = [
    (),
    (("linear", None),),
    (("*", QConfig(observer="minmax")),),
]
FILTERS = {
    "all": ModuleFilter(),
    "no linear": ModuleFilter(exclude_op_types="linear"),
}


def tensors(value: Any) -> list[Tensor]:
    return [x.clone() for x in flatten_output(value)[0] if isinstance(x, Tensor)]


def call(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The outputs, and what the call has left in its arguments."""
    args, kwargs = copy.deepcopy(inputs)
    return tensors((model(*args, **kwargs), args, kwargs))


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def plain(state: Any) -> list[Any]:
    """A state as a list that ``==`` compares."""
    leaves, spec = pytree.tree_flatten(state)
    values = [x.tolist() if isinstance(x, Tensor) else x for x in leaves]
    return [str(spec), *map(repr, values)]


def edit(quantizer: Quantizer, summary: Path | None) -> None:
    """Load a summary's formats, and keep the ranges."""
    state = quantizer.state_dict()
    if summary is not None:
        quantizer.load_summary(summary)
        quantizer.load_state_dict(state)


def run(function: Callable[[], Any], in_thread: bool) -> Any:
    """Its result; an error in a thread is raised here."""
    if not in_thread:
        return function()
    found: list[Any] = []

    def target() -> None:
        try:
            with torch.no_grad():
                found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]
