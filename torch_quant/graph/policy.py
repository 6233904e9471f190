"""Which modules are captured as graphs: ``capture=`` of a quantizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from torch_quant.config import QConfig
from torch_quant.core.naming import check_names, did_you_mean, matches_name
from torch_quant.core.spec import BFLOAT16
from torch_quant.errors import InvalidConfig

__all__ = ["Capture", "CapturePolicy", "checked_capture", "default_capture", "is_container"]

Capture = str | Iterable[str]
"""Whole, by modules, or names of modules."""

_WHOLE, _MODULES = "whole", "modules"
_NORMS = (
    nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.LocalResponseNorm,
    getattr(nn, "RMSNorm", nn.LayerNorm),
)  # fmt: skip
"""Modules with weights and no quantizable operator."""
_AT_ONCE = (nn.MultiheadAttention,)
"""Modules that compute with weights of their own and with those of a child that they never call."""


@dataclass(frozen=True)
class CapturePolicy:
    """What is captured as one graph each; the code around it stays Python.

    Args:
        choice: ``"whole"``, ``"modules"``, or names, globs and ``re:`` expressions.
        asked: whether the user chose it.
    """

    choice: str | tuple[str, ...] = _WHOLE
    asked: bool = field(default=True, repr=False)

    @property
    def whole(self) -> bool:
        """Whether the model is one graph if it can be."""
        return self.choice == _WHOLE

    @property
    def reason(self) -> str:
        """Why the model runs as Python."""
        if self.asked:
            return f"the quantizer was made with capture={self.data()!r}"
        return (
            f"capture={self.data()!r} is the default where activations need no ranges; "
            "Quantizer(capture='whole') captures the model as one graph"
        )

    def data(self) -> str | list[str]:
        """The choice as plain data."""
        return self.choice if isinstance(self.choice, str) else list(self.choice)

    def check(self, model: nn.Module) -> None:
        """Raise :class:`InvalidConfig` for a name that ``model`` does not have."""
        if not isinstance(self.choice, str):
            names = [name for name, _ in model.named_modules() if name]
            check_names(self.choice, names, "capture=")

    def targets(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(path, module) of what is captured, outermost first, each module once."""
        seen: set[int] = set()
        for path, module in self._targets(model, ""):
            if id(module) not in seen:
                seen.add(id(module))
                yield path, module

    def is_target(self, path: str, module: nn.Module) -> bool:
        """Whether the module is captured as one graph."""
        if self.whole or is_container(module):
            return self.whole
        if isinstance(self.choice, str):
            return computes_with_weights(module)
        return any(matches_name(path, pattern) for pattern in self.choice)

    def _targets(self, module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module._modules.items():
            if child is None:
                continue
            where = f"{path}.{name}".strip(".")
            if self.is_target(where, child):
                yield where, child
            elif not isinstance(child, torch.jit.ScriptModule):
                yield from self._targets(child, where)


def is_container(module: nn.Module) -> bool:
    """Whether a module is never called itself."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return (
        not scripted
        and type(module).forward is nn.Module.forward
        and ("forward" not in vars(module))
    )


def computes_with_weights(module: nn.Module) -> bool:
    """Whether a module is a leaf that holds a weight, as a linear layer or one of yours."""
    if isinstance(module, (*_NORMS, torch.jit.ScriptModule)):
        return False
    large = any(x is not None and x.dim() > 2 for x in module._parameters.values())
    if large and not any(computes_with_weights(child) for child in module.children()):
        return True  # a convolution, or the experts of a mixture, with a function as a child
    leaf = not any(True for _ in module.children()) or is_parametrized(module)
    if not (leaf or isinstance(module, _AT_ONCE)):
        return False
    return any(x.dim() > 1 and x.is_floating_point() for x in module.parameters())


def default_capture(qconfig: QConfig, one_graph: bool = False) -> CapturePolicy:
    """What is captured where the user does not say: layer by layer if only scales of
    weights, or of each call, are needed.

    Args:
        qconfig: how layers are quantized.
        one_graph: whether the backend wants the whole model as one graph.

    >>> default_capture(QConfig()).choice
    'whole'
    """
    whole = one_graph or qconfig.needs_ranges or qconfig.input is BFLOAT16
    return CapturePolicy(_WHOLE if whole else _MODULES, asked=False)


def checked_capture(choice: Capture) -> CapturePolicy:
    """``choice`` in one form.

    Raises:
        InvalidConfig: it is none of what can be chosen.

    >>> checked_capture("modules"), checked_capture(["encoder.layer.*"]).choice
    (CapturePolicy(choice='modules'), ('encoder.layer.*',))
    """
    if choice in (_WHOLE, _MODULES):
        return CapturePolicy(str(choice))
    names = tuple(choice) if isinstance(choice, (list, tuple)) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        hint = did_you_mean(choice, (_WHOLE, _MODULES)) if isinstance(choice, str) else ""
        raise InvalidConfig(
            f'capture={choice!r}; expected "whole", "modules", or a list of names of modules, each '
            f'to be one graph: capture=["encoder.layer.*"]{hint}'
        )
    return CapturePolicy(names)
