"""The workflow that most tests share, and models with data for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from awkward import AWKWARD
from capturing_once import shared_exports
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import ZOO, samples

from torch_quant import Quantizer
from torch_quant.backends import available_backends

__all__ = [
    "BACKENDS",
    "CASES",
    "EVERY_BACKEND",
    "IN_FLOAT",
    "IN_PROCESS",
    "QUICK",
    "Case",
    "Inputs",
    "assert_unchanged",
    "calibrated",
    "equal",
    "rows",
    "run",
    "settled",
    "snapshot",
]

EVERY_BACKEND = [backend.name for backend in available_backends()]
"""Names of those that run on this machine."""
IN_PROCESS = [each.name for each in available_backends() if not each.fixes_numbers]
"""Runtimes outside of PyTorch's dispatcher: a session for each graph takes seconds."""
IN_FLOAT = [each.name for each in available_backends() if not each.frozen]
"""Those whose graphs hold float weights and compute as REFERENCE does: they have tests of their
own, and the invariants in long runs."""
BACKENDS = [name for name in EVERY_BACKEND if name not in (*IN_PROCESS, *IN_FLOAT)]
"""Names of those that compute in PyTorch, which can be traced and exported."""

QUICK = [name for name in EVERY_BACKEND if name not in ("inductor", *IN_FLOAT)]
"""Of these, those whose compiler does not take five seconds for each graph: for every run."""

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A model, inputs of any batch size, and several different inputs of batch 1.

    Both make new objects at each call, since some models write to their inputs.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    ones: Callable[[], list[Inputs]]
    kind: str


def rows(inputs: Inputs, count: int, axis: int = 0) -> list[Inputs]:
    """``inputs`` of batch ``count`` as that many of batch 1."""

    def pick(x: Any, i: int) -> Any:
        batched = isinstance(x, Tensor) and x.dim() > axis and x.shape[axis] == count
        return x.narrow(axis, i, 1).clone() if batched else x

    def row(i: int) -> Inputs:
        args, kwargs = pytree.tree_map(lambda x: pick(x, i), inputs)
        return args, kwargs

    return [row(i) for i in range(count)]


def _awkward(name: str) -> Case:
    entry = AWKWARD[name]
    if name == "cache_argument":  # an object that calls write to: each needs one of its own
        return Case(name, entry.build, entry.inputs, lambda: [entry.inputs(1)] * 1, "awkward")
    axis = 1 if name == "batch_second" else 0
    ones = lambda: [entry.inputs(1), *rows(entry.inputs(16), 16, axis)]  # noqa: E731
    return Case(name, entry.build, entry.inputs, ones, "awkward")


def _zoo(name: str) -> Case:
    entry = ZOO[name]
    ones = lambda: [((), inputs) for inputs in samples(name, 16)]  # noqa: E731
    return Case(name, entry.build, lambda batch: ((), entry.inputs(batch)), ones, entry.family)


CASES: dict[str, Case] = {name: _zoo(name) for name in ZOO} | {
    name: _awkward(name) for name in AWKWARD
}


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Call ``model`` on copies of ``inputs``."""
    args, kwargs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    return model(*args, **kwargs)


def calibrated(model: nn.Module, batches: list[Inputs], **options: Any) -> Quantizer:
    """A quantizer that has seen ``batches``; an equal model is exported once for an equal call."""
    quantizer = Quantizer(**options)
    calib_model = quantizer.calib(model)
    with shared_exports():
        for inputs in batches:
            run(calib_model, inputs)
    return quantizer


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that must not change in a user's model."""
    return {
        "state": {
            name: (id(x), x.detach().clone())
            for name, x in model.state_dict(keep_vars=True).items()
        },
        "modules": [(name, id(m), type(m), m.training) for name, m in model.named_modules()],
        "attributes": [(name, sorted(vars(m))) for name, m in model.named_modules()],
        "hooks": [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ],
        "grads": [x.requires_grad for x in model.parameters()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for name in ("modules", "attributes", "hooks", "grads"):
        assert after[name] == before[name], name
    assert after["state"].keys() == before["state"].keys()
    for name, (identity, value) in before["state"].items():
        assert after["state"][name][0] == identity, name
        assert torch.equal(after["state"][name][1], value), name


def settled(scripted: Any, x: tuple[Any, ...]) -> Any:
    """The output once a compiler behind TorchScript has seen the shapes."""
    for _ in range(2):
        scripted(*x)
    return scripted(*x)


def equal(x: Tensor, y: Tensor) -> bool:
    """Bit equality; up to rounding once IPEX is loaded, which replaces kernels of float operators.

    (Layer norms, and whatever stands in a traced graph: one and the same computation is then done
    by different kernels, depending on how it is run.)
    """
    if "intel_extension_for_pytorch" in sys.modules:
        return torch.allclose(x, y, rtol=1e-4, atol=1e-5)
    return torch.equal(x, y)
