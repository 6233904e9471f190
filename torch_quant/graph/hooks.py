"""The user's forward hooks: they run around a piece, on real data, once a call."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

__all__ = ["CALLED", "give_hooks", "hooked", "records_outputs", "take_hooks", "users_hooks"]

Hooks = dict[str, dict[int, Any]]
"""Entry of a module's dictionary -> what is registered there."""

CALLED = ("_forward_pre_hooks", "_forward_hooks")
_FLAGS = (
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip
_COMPUTES = ("torch.nn.utils", "transformers.")
"""Hooks that belong to the computation: PyTorch's own (weight norm, pruning) make weights, those of
transformers collect hidden states for the outputs."""

_RECORDED = "_output_capturing_hooks_installed"
"""The attribute by which transformers knows that a model has its hooks."""


def records_outputs(key: Any, value: Any) -> bool:
    """Whether an entry of a module's or hook's dictionary only hands hidden states to the outputs.

    transformers sets such hooks at the first call that asks for hidden states or attention maps;
    they give nothing to later calls.
    """
    found = isinstance(value, types.FunctionType) and _module_of(value).startswith("transformers.")
    return key == _RECORDED or (isinstance(key, int) and found)


def _module_of(hook: Any) -> str:
    return getattr(hook, "__module__", None) or ""


def users_hooks(module: nn.Module) -> set[int]:
    """The ids of the user's hooks on ``module``."""
    if isinstance(module, torch.jit.ScriptModule):  # its hooks are compiled with it
        return set()
    return {
        key
        for name in CALLED
        for key, hook in vars(module)[name].items()
        if not _module_of(hook).startswith(_COMPUTES)
    }


def hooked(module: nn.Module) -> str:
    """The path of a module below ``module`` that has hooks of the user's; empty if none has."""
    return next((path for path, each in module.named_modules() if path and users_hooks(each)), "")


def take_hooks(module: nn.Module) -> Hooks:
    """Take the user's hooks off ``module``, a twin."""
    keys = users_hooks(module)
    taken: Hooks = {}
    if not keys:
        return taken
    for name in (*CALLED, *_FLAGS):
        entries = vars(module)[name]
        taken[name] = {key: entries.pop(key) for key in list(entries) if key in keys}
    return taken


def give_hooks(module: nn.Module, hooks: Hooks) -> None:
    """Let hooks that were taken off one module run around another."""
    for name, entries in hooks.items():
        vars(module)[name].update(entries)
