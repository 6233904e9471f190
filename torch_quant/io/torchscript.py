"""Deploy as TorchScript: one file, sizes dynamic, integer weights."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_quant.errors import InvalidConfig

__all__ = ["export_torchscript", "write_atomically"]


def export_torchscript(
    quant_model: nn.Module, example_inputs: Any, path: str | os.PathLike[str]
) -> torch.jit.ScriptModule:
    """Trace, freeze and save a quantized model.

    The file holds integer weights and serves every batch size and length that the model does. A
    process that loads it must ``import torch_quant`` first, for the operators.

    Args:
        quant_model: what ``Quantizer.quantize`` returned.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keywords.
        path: where to save; written at the end, in one step.

    Returns:
        The traced and frozen module. Dictionaries among the outputs stay dictionaries.

    Raises:
        InvalidConfig: the folder does not exist, or the model cannot be traced.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's deprecation, and the tracer's on constants
        try:
            if isinstance(example_inputs, dict):
                traced = torch.jit.trace(
                    quant_model, example_kwarg_inputs=example_inputs, strict=False
                )
            else:
                traced = torch.jit.trace(quant_model, example_inputs, strict=False)
        except RuntimeError as error:
            raise InvalidConfig(
                f"the quantized model cannot be traced: {error}. Outputs must be tensors, or "
                "tuples or dictionaries of them; data-dependent Python code between captured "
                "pieces is traced as it ran"
            ) from error
        frozen: torch.jit.ScriptModule = torch.jit.freeze(traced.eval())
    write_atomically(path, lambda file: torch.jit.save(frozen, file))
    return frozen


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it: all or nothing.

    Raises:
        InvalidConfig: the folder does not exist or may not be written to.
    """
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise InvalidConfig(
            f"cannot write {target}: {error.strerror}; give a writable folder"
        ) from error
    os.close(handle)
    try:
        write(name)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
