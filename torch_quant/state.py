"""What calibration has learned: tensor key -> observer."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig, NotCalibrated, QuantError
from torch_quant.observers import OBSERVERS, Observer, observer_class

__all__ = ["QuantState"]

logger = logging.getLogger("torch_quant")


class QuantState:
    """Statistics of every candidate tensor of one model, and how many batches gave them."""

    def __init__(self) -> None:
        self.observers: dict[str, Observer] = {}
        self.batches = 0

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """One calibration batch: recorded whole, or not at all if anything raises."""
        saved = copy.deepcopy(self.observers)
        try:
            yield
        except BaseException:
            self.observers = saved
            raise
        self.batches += 1

    def observe(self, key: str, x: Tensor, make: Callable[[], Observer]) -> None:
        """Record one tensor.

        Args:
            key: the tensor's key.
            x: its value, float, any shape.
            make: makes the observer if the key is new.

        Raises:
            QuantError: ``x`` is empty or not finite; names the tensor and the batch.
        """
        if key not in self.observers:
            self.observers[key] = make()
        try:
            self.observers[key].observe(x)
        except QuantError as error:
            raise QuantError(
                f"calibration batch {self.batches}, at {key.removeprefix(':')}: {error}. "
                "Nothing of this batch was recorded; leave it out or mend it and go on."
            ) from error

    def qparams(self, key: str, spec: QuantSpec) -> QParams:
        """The grid of a tensor; raises :class:`NotCalibrated` where no data passed it."""
        observer = self.observers.get(key)
        if observer is None or observer.batches == 0:
            raise NotCalibrated(
                f"no calibration data passed {key}; run data through quantizer.calib(model) that "
                "reaches it, or exclude it with ModuleFilter(exclude_names=...)"
            )
        return observer.qparams(spec)

    def describe(self) -> dict[str, Any]:
        """How the ranges came about: the number of batches, and the observers by name."""
        names = sorted({observer.name for observer in self.observers.values()})
        return {"batches": self.batches, "observers": names}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that ``torch.load(weights_only=True)`` reads it."""
        foreign = {each.name for each in self.observers.values()} - set(OBSERVERS)
        if foreign:
            logger.warning("ranges of %s can be saved but not loaded", ", ".join(sorted(foreign)))
        return {
            "batches": self.batches,
            "observers": {
                key: {"observer": observer.name, **observer.state_dict()}
                for key, observer in self.observers.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back :meth:`state_dict`; nothing changes if it cannot be read."""
        try:
            observers = {}
            for key, data in state["observers"].items():
                values = dict(data)
                observers[key] = observer_class(values.pop("observer"))()
                observers[key].load_state_dict(values)
            batches = int(state["batches"])
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidConfig(
                f"not a calibration state: {error!r} is missing or wrong"
            ) from error
        self.observers, self.batches = observers, batches
