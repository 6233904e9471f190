"""What calibration has learned: the statistics of each tensor, and the weights they hold for."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torch_quant.core.granularity import PerChannel
from torch_quant.core.plan import PRECISIONS
from torch_quant.core.qparams import QParams
from torch_quant.core.rounded import RoundedWeights, checksum
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig, NotCalibrated, QuantError
from torch_quant.statistics import CHANNELS, RANGE, STATISTICS, Observer, Statistic, statistic_class
from torch_quant.statistics.base import count_of, entry

__all__ = ["Makers", "QuantState", "check_saved", "weight_checksums"]

VERSION = 3
"""Of saved states. Earlier ones are read too; those of version 1 do not say theirs."""

Makers = Mapping[str, Callable[[], Statistic]]
"""Which statistics are wanted of a tensor, by what they are for -> what makes a new one."""

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
    return {name: checksum(x) for name, x in weights.items() if x.device.type != "meta"}


class QuantState:
    """Statistics of every candidate tensor of one model, and how many batches gave them."""

    def __init__(self) -> None:
        self.statistics: dict[str, dict[str, Statistic]] = {}
        """Tensor key -> what it is for, :data:`RANGE` say -> the statistic."""
        self.batches = 0
        self.lock = threading.RLock()
        """Held for a batch: observers see one at a time."""
        self.weights: dict[str, int] = {}
        """Checksums of the weights that the ranges were observed with."""
        self.fingerprint: dict[str, str] = {}
        """Facts of the model that the ranges are of, see ``model.fingerprint``."""
        self.rounded = RoundedWeights()
        """Codes of weights that were rounded a block at a time."""
        self.version = 0
        """Grows with every change of the ranges."""
        self._marks: Any = None
        self._told: dict[str, int] = {}

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """One calibration batch: recorded whole, or not at all if anything raises."""
        saved = {
            key: {what: each.snapshot() for what, each in kept.items()}
            for key, kept in self.statistics.items()
        }
        try:
            yield
        except BaseException:
            self.statistics = saved
            raise
        self.batches += 1
        self.version += 1

    def note_weights(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Remember the weights of ``model``, which the last batch ran through.

        Args:
            model: the float model.
            parameters: all that it has.
        """
        marks = [(id(x), -1 if x.is_inference() else x._version) for x in parameters]
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

    def find(self, key: str, what: str = RANGE) -> Statistic | None:
        """A statistic of a tensor, None where nothing was recorded."""
        found = self.statistics.get(key, {}).get(what)
        return found if found is not None and found.batches else None

    def passed_by(self, key: str, what: str) -> bool:
        """Whether no data reached a tensor, while such a statistic was recorded of others."""
        known = any(each.batches for each in self.statistics.get(key, {}).values())
        return not known and any(what in kept for kept in self.statistics.values())

    def put(self, key: str, what: str, statistic: Statistic) -> None:
        """Put a statistic in the place of the one that was recorded."""
        self.statistics.setdefault(key, {})[what] = statistic
        self.batches = max(self.batches, 1)
        self.version += 1

    def observe(self, key: str, makers: Makers, x: Tensor) -> None:
        """Record one tensor.

        Args:
            key: of the tensor.
            makers: the statistics that are wanted of it.
            x: its value, float, any shape.

        Raises:
            QuantError: ``x`` is empty or not finite; names the tensor and the batch.
        """
        kept = self.statistics.setdefault(key, {})
        for what, make in makers.items():
            if what not in kept:
                kept[what] = make()
            try:
                kept[what].observe(x)
            except QuantError as error:
                raise QuantError(
                    f"calibration batch {self.batches}, at {key.removeprefix(':')}: {error}. "
                    "Nothing of this batch was recorded; leave it out or fix it and go on."
                ) from error

    def copied(self) -> QuantState:
        """A copy of the statistics, which later ones do not reach."""
        made = QuantState()
        made.take(self)
        made.statistics = copy.deepcopy(self.statistics)
        return made

    def take(self, other: QuantState) -> None:
        """Have what ``other`` has."""
        self.statistics, self.batches = other.statistics, other.batches
        self.weights, self._marks = other.weights, None
        self.rounded = other.rounded.copied()
        self.version += 1

    def merge(self, other: QuantState) -> None:
        """Take in what another calibration of the same model has recorded, whole or not at all.

        Raises:
            InvalidConfig: a tensor was recorded by other statistics there; names it.
        """
        rounded = self.rounded.copied() if self.rounded else other.rounded.copied()
        if self.rounded and other.rounded and self.rounded is not other.rounded:
            raise InvalidConfig(
                "both have weights that round_weights() has rounded, which cannot be joined: run "
                "it once, after merging"
            )
        merged = copy.deepcopy(self.statistics)
        for key, theirs in other.statistics.items():
            ours = merged.setdefault(key, {})
            for what, statistic in theirs.items():
                try:
                    if what in ours:
                        ours[what].merge(statistic)
                    else:
                        ours[what] = copy.deepcopy(statistic)
                except InvalidConfig as error:
                    raise InvalidConfig(f"the {what} of {key}: {error}") from error
        if self.weights and other.weights and self.weights != other.weights:
            logger.warning(
                "the calibrations that are merged ran with other weights: the ranges mix both"
            )
        self.statistics, self.batches = merged, self.batches + other.batches
        self.weights = self.weights or dict(other.weights)
        self.rounded = rounded
        self.version += 1

    def qparams(self, key: str, spec: QuantSpec) -> QParams:
        """The grid of a tensor; raises :class:`NotCalibrated` where no data passed it."""
        observer = self.find(key)
        if not isinstance(observer, Observer):
            raise NotCalibrated(
                f"no calibration data passed {key}; run data through quantizer.calib(model) that "
                "reaches it, or exclude it with ModuleFilter(exclude_names=...)"
            )
        return observer.qparams(spec)

    def describe(self) -> dict[str, Any]:
        """How the ranges came about: the number of batches, and the observers by name."""
        found = (kept[RANGE].name for kept in self.statistics.values() if RANGE in kept)
        return {"batches": self.batches, "observers": sorted(set(found))}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that ``torch.load(weights_only=True)`` reads it."""
        names = {each.name for kept in self.statistics.values() for each in kept.values()}
        if foreign := names - set(STATISTICS):
            logger.warning("ranges of %s can be saved but not loaded", ", ".join(sorted(foreign)))
        return {
            "version": VERSION,
            "batches": self.batches,
            "statistics": {
                key: {
                    what: {"statistic": each.name, **each.state_dict()}
                    for what, each in kept.items()
                }
                for key, kept in self.statistics.items()
                if kept
            },
            "weights": dict(self.weights),
            **({"rounded": self.rounded.state_dict()} if self.rounded else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back :meth:`state_dict`; nothing changes if it cannot be read.

        Raises:
            InvalidConfig: it is something else; says which entry is wrong.
        """
        try:
            _check_entries(
                state, {"batches"}, {"version", "statistics", "observers", "weights", "rounded"}
            )
            version = count_of(state, "version") if {"version", "statistics"} & set(state) else 1
            if not 1 <= version <= VERSION:
                raise InvalidConfig(f"'version' is {version}; expected 1 to {VERSION}")
            tensors = "statistics" if version == VERSION else "observers"
            _check_entries(state, {"batches", tensors}, {"weights", "version", "rounded"})
            batches = count_of(state)
            saved = _by_name(state, tensors, Mapping)
            statistics = _statistics(saved if version == VERSION else _renewed(saved, version))
            weights = _by_name(state, "weights", int) if "weights" in state else {}
            for name in weights:
                count_of(weights, name)
            rounded = RoundedWeights()
            if "rounded" in state:
                rounded = RoundedWeights.from_state(state["rounded"])
            seen = (each.batches for kept in statistics.values() for each in kept.values())
            if not batches and any(seen):
                raise InvalidConfig("'batches' is 0, but statistics have seen data")
        except InvalidConfig as error:
            raise InvalidConfig(f"not a calibration state: {error}") from error
        loaded = QuantState()
        loaded.statistics, loaded.batches, loaded.weights = statistics, batches, weights
        loaded.rounded = rounded
        self.take(loaded)


def check_saved(
    state: Mapping[str, Any],
) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, str]]]:
    """The fingerprint of the model, what fell back and what is slower, of a saved ``Quantizer``.

    Raises:
        InvalidConfig: it is something else; says which entry is wrong.
    """
    try:
        _check_entries(state, {"state", "model"}, {"fallback", "slower", "reduced"})
        if not isinstance(state.get("reduced", False), bool):
            raise InvalidConfig(f"'reduced' is {state['reduced']!r}; expected a bool")
        fingerprint = _by_name(state, "model", str)
        fallen = _by_name(state, "fallback", str) if "fallback" in state else {}
        for name, precision in fallen.items():
            if precision not in PRECISIONS:
                raise InvalidConfig(
                    f"'fallback' has {precision!r} for {name!r}; expected {' or '.join(PRECISIONS)}"
                )
        slower = _by_name(state, "slower", Mapping) if "slower" in state else {}
        try:
            found = {backend: _by_name(slower, backend, str) for backend in slower}
        except InvalidConfig as error:
            raise InvalidConfig(f"'slower': {error}") from error
    except InvalidConfig as error:
        raise InvalidConfig(
            f"not a Quantizer state: {error}; give what Quantizer.state_dict() returned"
        ) from error
    return fingerprint, fallen, found


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


def _renewed(saved: Mapping[str, Any], version: int) -> dict[str, dict[str, Any]]:
    """The entries of versions 1 and 2 in the present form.

    They had one observer for each name, and ``[channels]`` behind the names of channels. Version 1
    named the axis of the channels, and has such statistics of the last one only.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, values in saved.items():
        values = dict(values)
        if version == 1 and "granularity" in values:
            raise InvalidConfig(
                "'granularity' belongs to version 2, but the state has no 'version'"
            )
        axis = entry(values, "ch_axis", int, type(None)) if "ch_axis" in values else None
        if version == 1 and axis is not None:
            values["granularity"] = str(PerChannel(axis))
        if version == 1:
            values.pop("ch_axis", None)
        if "observer" in values:
            values["statistic"] = values.pop("observer")
        key = name.removesuffix("[channels]")
        found.setdefault(key, {})[RANGE if key == name else CHANNELS] = values
    return found


def _statistics(saved: Mapping[str, Any]) -> dict[str, dict[str, Statistic]]:
    found: dict[str, dict[str, Statistic]] = {}
    for key, kept in saved.items():
        for what, values in _by_name(saved, key, Mapping).items():
            try:
                found.setdefault(key, {})[what] = _statistic(values)
            except Exception as error:  # whatever a class of the user's raises
                raise InvalidConfig(f"the {what} of {key!r}: {_facts(error)}") from error
        if not kept:
            raise InvalidConfig(f"{key!r} has no statistic, {RANGE!r} say")
    return found


def _statistic(saved: Mapping[str, Any]) -> Statistic:
    statistic = statistic_class(entry(saved, "statistic", str))()
    values = {name: value for name, value in saved.items() if name != "statistic"}
    statistic.load_state_dict(values)
    if unknown := set(values) - set(statistic.state_dict()):
        raise InvalidConfig(f"{_listed(unknown)} is no entry of {statistic.name!r}")
    return statistic


def _facts(error: Exception) -> str:
    return str(error) if isinstance(error, QuantError) else f"{type(error).__name__}: {error}"
