"""What a layout of checkpoints is: how it writes quantized weights, and how it reads them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from torch_quant.checkpoints.files import CheckpointFiles
from torch_quant.convert.codes import QuantizedWeight
from torch_quant.core.granularity import PerChannel, PerGroup
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig

__all__ = ["FLOATS", "Layout", "Stored", "common_refusal", "group_size", "wrong_entry"]

FLOATS = ("F32", "F16", "BF16")
"""What scales may be, as safetensors names it."""


@dataclass(frozen=True)
class Stored:
    """How one weight lies in a checkpoint.

    Args:
        spec: its format.
        shape: ``(out, in)``.
        tensors: the names of all that it consists of.
        activation: the format of the layer's input, None where that stays in float.
    """

    spec: QuantSpec
    shape: tuple[int, int]
    tensors: frozenset[str]
    activation: QuantSpec | None = None


class Layout(Protocol):
    """One layout."""

    @property
    def name(self) -> str:
        """What ``quant_method`` says."""

    def refusal(self, weight: QuantizedWeight) -> str:
        """Why it cannot hold a weight, with what it can; empty if it can."""

    def config(
        self, weights: Mapping[str, QuantizedWeight], in_float: Sequence[str]
    ) -> dict[str, Any]:
        """The ``quantization_config``.

        Args:
            weights: by module, all of which it can hold.
            in_float: the other linear modules.
        """

    def tensors(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """What is written of a weight, by the ending behind the module's name.

        Args:
            weight: one that it can hold.
            dtype: of scales.
        """

    def stored(self, files: CheckpointFiles, about: Mapping[str, Any]) -> dict[str, Stored]:
        """The quantized weights of a checkpoint, by module.

        Args:
            files: the checkpoint.
            about: its ``quantization_config``.

        Raises:
            InvalidConfig: it is of another version, is damaged, or holds what cannot be read.
        """

    def read(self, files: CheckpointFiles, module: str, stored: Stored) -> tuple[Tensor, QParams]:
        """Codes in ``stored.spec.dtype`` and their grid; raises as :meth:`stored` does."""


def group_size(weight: QuantizedWeight) -> int | None:
    """Inputs that share a scale, None for all of an output channel."""
    granularity = weight.spec.granularity
    return granularity.size if isinstance(granularity, PerGroup) else None


def common_refusal(weight: QuantizedWeight, bits: Sequence[int]) -> str:
    """What no layout of linear layers' integers can hold."""
    spec, plan = weight.spec, weight.plan
    if plan.op != "linear" or weight.codes.dim() != 2:
        return f"it holds linear layers, and this is {plan.op}"
    if not spec.integer or spec.bits not in bits:
        allowed = ", ".join(map(str, bits))
        return f"it holds integers of {allowed} bits, not {spec}"
    if spec.float_zero_points:
        return f"it holds zero points that are codes, not {spec}"
    if not isinstance(spec.granularity, (PerChannel, PerGroup)):
        return f"it holds a scale for each output channel or group of inputs, not {spec}"
    if weight.scale.shape[0] != weight.codes.shape[0]:
        return f"it holds groups of inputs, not {spec}"
    return ""


def wrong_entry(files: CheckpointFiles, what: str, given: object, expected: str) -> InvalidConfig:
    """The error of an entry in ``config.json`` that cannot be read."""
    return InvalidConfig(
        f"{files.folder / 'config.json'}: quantization_config has {what} {given!r}; expected "
        f"{expected}"
    )
