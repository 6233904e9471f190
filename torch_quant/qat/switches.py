"""What a QAT model does in train mode: observe, round, keep the statistics of batch norms.

The switches are one buffer of the model, so checkpoints, copies and DistributedDataParallel carry
them, and the count of steps with them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_quant.core.naming import numbered
from torch_quant.errors import InvalidConfig

__all__ = ["Switches", "add_switches"]

_NAME = "qat_switches"
STEPS, OBSERVE, FAKE_QUANTIZE, FREEZE_BN = range(4)


@dataclass
class Switches:
    """Reads and sets the switches of a model, and holds those that are no part of its state.

    Args:
        buffers: of the whole model.
        name: of the buffer.
        never_rounds: nothing is rounded in any mode.
        watches: whether the first value that is not finite raises.
        taps: modules whose results are kept.
        tapped: those results, of the last call.
        held: what was read, for as long as a call of the whole model goes on.
    """

    buffers: dict[str, Tensor | None]
    name: str
    never_rounds: bool = False
    watches: bool = False
    taps: tuple[str, ...] = ()
    tapped: dict[str, Tensor] = field(default_factory=dict)
    held: tuple[int, bool, bool, bool] | None = None

    def __deepcopy__(self, memo: Any) -> Switches:
        """A copy has the state and nothing else."""
        return Switches(copy.deepcopy(self.buffers, memo), self.name, self.never_rounds)

    def record(self, module: str, x: Tensor) -> None:
        """Keep the result of a module."""
        self.tapped[module] = x

    @property
    def tensor(self) -> Tensor:
        """int64 of shape ``[4]``: steps, observe, fake-quantize, freeze batch norms."""
        found = self.buffers[self.name]
        assert found is not None
        return found

    def read(self) -> tuple[int, bool, bool, bool]:
        """The same as Python values."""
        if self.held is not None:
            return self.held
        steps, *switches = self.tensor.tolist()
        observe, rounds, frozen = map(bool, switches)
        return steps, observe, rounds, frozen

    def write(self, place: int, value: int) -> None:
        """Set one of them in place."""
        self.tensor[place] = value
        self.held = None

    @contextlib.contextmanager
    def read_once(self) -> Iterator[None]:
        """Inside, the tensor is read once, though every part of a model asks."""
        before, self.held = self.held, self.read()
        try:
            yield
        finally:
            self.held = before


def add_switches(model: nn.Module) -> Switches:
    """Give a model the buffer: nothing is observed, all is rounded, no norm is frozen."""
    name = next(x for x in numbered(_NAME) if x not in model._buffers and not hasattr(model, x))
    model._buffers[name] = torch.tensor([0, 0, 1, 0])
    return Switches(model._buffers, name)


def checked_step(name: str, value: Any) -> int:
    """``value`` as a number of steps; raises :class:`InvalidConfig` if it is none."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidConfig(f"{name}={value!r}; expected a number of steps, 0 or more")
    return value
