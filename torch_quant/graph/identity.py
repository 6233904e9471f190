"""What a model has to be to be taken, and to be the one that was taken before."""

from __future__ import annotations

import torch
from torch import nn

from torch_quant.errors import InvalidConfig, NotCalibrated, UnsupportedOp

__all__ = ["Fingerprint", "check_fingerprint", "check_model", "check_same", "fingerprint"]

Fingerprint = dict[str, str]
"""Module, parameter or buffer name -> class, or shape and dtype."""


def fingerprint(model: nn.Module) -> Fingerprint:
    """What must not change between calibration and quantization; values may."""
    facts = {f"module {name or '(root)'}": type(m).__name__ for name, m in model.named_modules()}
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        facts[f"tensor {name}"] = f"{tuple(x.shape)} {x.dtype}"
    return facts


def check_same(before: Fingerprint, model: nn.Module) -> None:
    """Raise :class:`NotCalibrated` if ``model`` is not the one that ``before`` was taken of."""
    check_fingerprint(before, fingerprint(model))


def check_fingerprint(before: Fingerprint, after: Fingerprint) -> None:
    """Raise :class:`NotCalibrated` unless both are of one model."""
    for name in (*before, *after):
        if before.get(name) != after.get(name):
            raise NotCalibrated(
                f"the model is not the one that was calibrated: {name} was "
                f"{before.get(name, 'absent')} and is {after.get(name, 'absent')}; "
                "use a new Quantizer() for it and calibrate again"
            )


def check_model(model: nn.Module, devices: frozenset[str], backend: str) -> None:
    """Raise an error that says what to do if ``model`` cannot be taken at all."""
    if not isinstance(model, nn.Module):
        raise InvalidConfig(f"expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidConfig("the model is TorchScript already; give the nn.Module it came from")
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if x.is_floating_point() and x.dtype != torch.float32 and isinstance(x, nn.Parameter):
            raise UnsupportedOp(
                f"parameter {name} is {x.dtype}; expected torch.float32: quantize "
                "copy.deepcopy(model).float()"
            )
        if x.device.type not in devices:
            raise InvalidConfig(
                f"{name} is on {x.device}, but backend {backend} runs on "
                f"{', '.join(sorted(devices))}: quantize copy.deepcopy(model).cpu(), or use "
                "Backend.REFERENCE"
            )
