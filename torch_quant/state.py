"""What calibration has learned: tensor key -> observer, and the weights that it holds for."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_quant.core.granularity import PerChannel
from torch_quant.core.plan import PRECISIONS
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig, NotCalibrated, QuantError
from torch_quant.observers import OBSERVERS, Observer, observer_class
from torch_quant.observers.base import count_of, entry

__all__ = ["QuantState", "check_saved", "weight_checksums"]

VERSION = 2
"""Of saved states. Those of version 1, which do not say theirs, are read too."""

logger = logging.getLogger("torch_quant")


def weight_checksums(model: nn.Module) -> dict[str, int]:
    """A number for each parameter, and for the statistics of each batch norm, by its values.

    Other buffers are left out: a model may write to them in any call.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> before = weight_checksums(layer)
    >>> _ = layer.weight.data.add_(1.0)
    >>> weight_checksums(layer) == before
    False
    """
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for kind in ("running_mean", "running_var"):
                if (buffer := getattr(module, kind)) is not None:
                    weights[f"{name}.{kind}".strip(".")] = buffer
    return {name: _checksum(x) for name, x in weights.items() if x.device.type != "meta"}


def _checksum(x: Tensor) -> int:
    values: Any = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(values)


class QuantState:
    """Statistics of every candidate tensor of one model, and how many batches gave them."""

    def __init__(self) -> None:
        self.observers: dict[str, Observer] = {}
        self.batches = 0
        self.lock = threading.RLock()
        """Held for a batch: observers see one at a time."""
        self.weights: dict[str, int] = {}
        """Checksums of the weights that the ranges were observed with."""
        self.fingerprint: dict[str, str] = {}
        """Facts of the model that the ranges are of, see ``model.fingerprint``."""
        self.version = 0
        """Grows with every change of the ranges."""
        self._marks: Any = None
        self._told: dict[str, int] = {}

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
        self.version += 1

    def note_weights(self, model: nn.Module) -> None:
        """Remember the weights of ``model``, which the last batch ran through."""
        marks = [(id(x), -1 if x.is_inference() else x._version) for x in model.parameters()]
        if marks == self._marks:  # reading all values takes as long as some small models do
            return
        self._marks, now = marks, weight_checksums(model)
        if self.weights and now != self.weights:
            logger.warning(
                "the weights changed between calibration batches: the ranges mix both; a new "
                "Quantizer() and quantizer.calib(model) give those of the present weights"
            )
        self.weights = now

    def compare_weights(self, model: nn.Module) -> None:
        """Log a warning, once, if ``model`` has other weights than the ranges were observed with.

        Ranges that were saved before weights were noted, or read from a summary, tell nothing.
        """
        if not self.weights:
            return
        now = weight_checksums(model)
        changed = [name for name, value in now.items() if self.weights.get(name) != value]
        if not changed or now == self._told:
            return
        self._told = now
        rest = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        logger.warning(
            "the ranges were calibrated with other weights: %s%s changed since. A small change "
            "does little harm; after a larger one, calibrate a new Quantizer() with "
            "quantizer.calib(model)",
            changed[0],
            rest,
        )

    def put(self, observers: Mapping[str, Observer]) -> None:
        """Put observers in the place of those of the same tensors."""
        self.observers |= observers
        self.batches = max(self.batches, 1)
        self.version += 1

    def observe(self, makers: Mapping[str, Callable[[], Observer]], x: Tensor) -> None:
        """Record one tensor.

        Args:
            makers: the names it is recorded under, and what makes the observer of a new one.
            x: its value, float, any shape.

        Raises:
            QuantError: ``x`` is empty or not finite; names the tensor and the batch.
        """
        for name, make in makers.items():
            if name not in self.observers:
                self.observers[name] = make()
            try:
                self.observers[name].observe(x)
            except QuantError as error:
                raise QuantError(
                    f"calibration batch {self.batches}, at {name.removeprefix(':')}: {error}. "
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
            "version": VERSION,
            "batches": self.batches,
            "observers": {
                key: {"observer": observer.name, **observer.state_dict()}
                for key, observer in self.observers.items()
            },
            "weights": dict(self.weights),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back :meth:`state_dict`; nothing changes if it cannot be read.

        Raises:
            InvalidConfig: it is something else; says which entry is wrong.
        """
        try:
            _check_entries(state, {"batches", "observers"}, {"weights", "version"})
            version = count_of(state, "version") if "version" in state else 1
            if not 1 <= version <= VERSION:
                raise InvalidConfig(f"'version' is {version}; expected 1 or {VERSION}")
            batches = count_of(state)
            observers = {}
            for key, saved in _by_name(state, "observers", Mapping).items():
                try:
                    observers[key] = _observer(_renewed(saved) if version == 1 else saved)
                except Exception as error:  # whatever a class of the user's raises
                    raise InvalidConfig(f"observer of {key!r}: {_facts(error)}") from error
            weights = _by_name(state, "weights", int) if "weights" in state else {}
            for name in weights:
                count_of(weights, name)
            if not batches and any(observer.batches for observer in observers.values()):
                raise InvalidConfig("'batches' is 0, but observers have seen data")
        except InvalidConfig as error:
            raise InvalidConfig(f"not a calibration state: {error}") from error
        self.observers, self.batches, self.weights = observers, batches, weights
        self._marks = None
        self.version += 1


def check_saved(state: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """The fingerprint of the model and what fell back, of a saved ``Quantizer``.

    Raises:
        InvalidConfig: it is something else; says which entry is wrong.
    """
    try:
        _check_entries(state, {"state", "model"}, {"fallback"})
        fingerprint = _by_name(state, "model", str)
        fallen = _by_name(state, "fallback", str) if "fallback" in state else {}
        for name, precision in fallen.items():
            if precision not in PRECISIONS:
                raise InvalidConfig(
                    f"'fallback' has {precision!r} for {name!r}; expected {' or '.join(PRECISIONS)}"
                )
    except InvalidConfig as error:
        raise InvalidConfig(
            f"not a Quantizer state: {error}; give what Quantizer.state_dict() returned"
        ) from error
    return fingerprint, fallen


def _check_entries(state: Any, needed: set[str], optional: set[str]) -> None:
    """Raise :class:`InvalidConfig` unless ``state`` is a dict with these entries."""
    if not isinstance(state, Mapping):
        raise InvalidConfig(f"it is of type {type(state).__name__}; expected a dict")
    found = set(state)
    if missing := needed - found:
        raise InvalidConfig(f"it lacks {', '.join(sorted(missing))}; it has {_listed(found)}")
    if unknown := found - needed - optional:
        raise InvalidConfig(
            f"it has {_listed(unknown)}; expected {', '.join(sorted(needed | optional))}"
        )


def _listed(names: set[Any]) -> str:
    shown = sorted(map(str, names))[:8]
    return ", ".join(shown + (["..."] if len(names) > len(shown) else [])) or "nothing"


def _by_name(state: Mapping[str, Any], name: str, kind: Any) -> dict[str, Any]:
    """An entry that is a dict with names as keys and values of one type."""
    found: Mapping[Any, Any] = entry(state, name, Mapping)
    for key, value in found.items():
        if not isinstance(key, str):
            raise InvalidConfig(f"{name!r} has the key {key!r}; expected names")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InvalidConfig(
                f"{name!r} has {value!r} for {key!r}; expected values of type {kind.__name__}"
            )
    return dict(found)


def _renewed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """An observer's entries in the present form, from those of version 1.

    It named the axis of the channels; its states hold such statistics of the last one only.
    """
    if "granularity" in saved:
        raise InvalidConfig("'granularity' belongs to version 2, but the state has no 'version'")
    found = dict(saved)
    axis = entry(found, "ch_axis", int, type(None)) if "ch_axis" in found else None
    found.pop("ch_axis", None)
    return found if axis is None else found | {"granularity": str(PerChannel(axis))}


def _observer(saved: Mapping[str, Any]) -> Observer:
    observer = observer_class(entry(saved, "observer", str))()
    values = {name: value for name, value in saved.items() if name != "observer"}
    observer.load_state_dict(values)
    if unknown := set(values) - set(observer.state_dict()):
        raise InvalidConfig(f"{_listed(unknown)} is no entry of {observer.name!r}")
    return observer


def _facts(error: Exception) -> str:
    return str(error) if isinstance(error, QuantError) else f"{type(error).__name__}: {error}"
