"""What a quantizer reads and writes: settings, ranges, summaries."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, distributed

from torch_quant.configuration import read_configuration
from torch_quant.core.documents import Lines
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import InvalidConfig, NotCalibrated
from torch_quant.graph.identity import check_fingerprint
from torch_quant.io.data.parted import joined, parted
from torch_quant.io.folder import read_folder, write_folder
from torch_quant.io.summary import load_summary, read_summary, save_summary, summary_data
from torch_quant.quantizer_base import QuantizerBase
from torch_quant.state import QuantState, check_saved

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["QuantizerFiles"]

T = TypeVar("T", bound="QuantizerFiles")


class QuantizerFiles(QuantizerBase):
    """The public methods of a :class:`Quantizer` that read and write."""

    @classmethod
    def from_config(cls: type[T], config: str | os.PathLike[str] | Mapping[str, Any]) -> T:
        """A quantizer with the settings of a file, or of data.

        Args:
            config: the path of a JSON or YAML file (``pip install pyyaml``), or what it would hold.

        Raises:
            InvalidConfig: it cannot be read, or holds a mistake; says which, in which line, and
                what was expected.
            BackendUnavailable: its backend does not run on this machine.

        >>> from torch_quant import Quantizer
        >>> config = {"backend": "reference", "overrides": {"head": {"input": {"bits": 6}}}}
        >>> Quantizer.from_config(config).overrides["head"].input.bits
        6
        """
        return cls(**read_configuration(config))

    def to_config(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """The settings as plain data, for :meth:`from_config`; ranges and fallback are none.

        Args:
            path: also write them there, as JSON or YAML by its ending.

        Raises:
            InvalidConfig: a function, or an observer or backend of yours that has no name, is among
                them; the path cannot be written.

        >>> from torch import nn
        >>> from torch_quant import Quantizer
        >>> Quantizer("reference", overrides={nn.Embedding: None}).to_config()
        {'version': 1, 'backend': 'reference', 'overrides': {'class:torch.nn.Embedding': None}}
        """
        return self._to_config(path)

    def state_dict(self) -> dict[str, Any]:
        """Ranges, their model and what fell back: plain values and tensors, for ``torch.save``.

        >>> from torch_quant import Quantizer
        >>> sorted(Quantizer("reference").state_dict())
        ['fallback', 'model', 'slower', 'state']
        """
        with self.state.lock:  # another thread may calibrate
            return {
                **({"reduced": True} if self._reduced else {}),
                "state": self.state.state_dict(),
                "model": dict(self.state.fingerprint),
                "fallback": dict(self.fallen_back),
                "slower": {name: dict(sites) for name, sites in self.slower.items()},
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back :meth:`state_dict`; raises :class:`InvalidConfig` if it is something else.

        Nothing changes then.

        >>> from torch_quant import Quantizer
        >>> quantizer = Quantizer("reference")
        >>> quantizer.load_state_dict(Quantizer("onednn").state_dict())
        """
        fingerprint, fallen, slower = check_saved(state)
        with self.state.lock:
            self.state.load_state_dict(state["state"])
            self.state.fingerprint, self.fallen_back = fingerprint, fallen
            self.slower, self._reduced = slower, state.get("reduced", False)
            self.plan = QuantPlan()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save settings, ranges and what fell back, as JSON and safetensors; see :meth:`load`.

        Args:
            folder: made if need be; an earlier save in it is replaced, whole or not at all.

        Raises:
            InvalidConfig: a setting is no data (a function, a class without a name), or nothing can
                be written there.

        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> from torch_quant import Quantizer
        >>> model, quantizer = nn.Linear(4, 2), Quantizer("reference")
        >>> _ = quantizer.calib(model)(torch.ones(8, 4))
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     quantizer.save(f"{parent}/ranges")
        ...     again = Quantizer.load(f"{parent}/ranges")
        >>> again.quantize(model, example_inputs=torch.ones(8, 4))(torch.ones(3, 4)).shape
        torch.Size([3, 2])
        """
        tensors: dict[str, Tensor] = {}
        data = {
            "settings": self._to_config(None),
            "summary": summary_data(self._summary),
            "state": parted(self.state_dict(), tensors),
        }
        write_folder(folder, "quantizer", data, tensors)

    @classmethod
    def load(cls: type[T], folder: str | os.PathLike[str]) -> T:
        """The quantizer that :meth:`save` saved.

        Raises:
            InvalidConfig: there is none; it is truncated, was changed since, or is of a newer
                version. Says which file.
            BackendUnavailable: its backend does not run on this machine.

        >>> from torch_quant import Quantizer
        >>> Quantizer.load("nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        torch_quant.errors.InvalidConfig: cannot read nowhere/quantizer.json: No such file ...
        """
        data, tensors = read_folder(folder, "quantizer")
        quantizer = cls(**read_configuration(data["settings"]))
        quantizer.load_state_dict(joined(data["state"], tensors))
        quantizer._summary = read_summary(data["summary"], Lines(f"{folder}"))
        return quantizer

    _reduced = False
    """Whether it has what every process has seen."""

    def merge(self, *others: QuantizerFiles | Mapping[str, Any]) -> None:
        """Take in what other quantizers recorded of the same model, each on a part of the data.

        The ranges are then those of one calibration on all of it: exactly for ``"minmax"``, and for
        the histograms of the other observers where batches have at most 32768 elements. Averages
        (``"moving_average"``) know an order of their batches, which parts have not: their mean is
        taken, weighted by batches.

        Args:
            others: quantizers, or what their :meth:`state_dict` gave, in another process say.

        Raises:
            InvalidConfig: one is of another model, or recorded other statistics; says which.
                Nothing changes then.

        >>> import torch
        >>> from torch import nn
        >>> from torch_quant import Quantizer
        >>> model, whole = nn.Linear(4, 2), Quantizer("reference")
        >>> for x in (torch.ones(8, 4), -torch.ones(8, 4)):
        ...     part = Quantizer("reference")
        ...     _ = part.calib(model)(x)
        ...     whole.merge(part.state_dict())
        >>> whole.state.batches
        2
        """
        saved = [each if isinstance(each, Mapping) else each.state_dict() for each in others]
        with self.state.lock:  # another thread may calibrate
            self._merge(saved)

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        """Make the ranges of every process those of all: each has calibrated on its share of data.

        Call it once, in every process of ``torch.distributed``, when all data were seen. The ranges
        are then the same everywhere, and as :meth:`merge` has them: for ``"minmax"``, those of one
        process with all data, bit for bit.

        Args:
            group: the processes; None for all.

        Raises:
            InvalidConfig: there is no process group, or this process is none of it; it was called
                before, for these ranges when they were saved too; processes have other settings, or
                recorded other models or statistics. The same in every process of the group, and
                nothing changes.
            NotCalibrated: no process has seen data.

        >>> from torch_quant import Quantizer
        >>> Quantizer("reference").all_reduce()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        torch_quant.errors.InvalidConfig: all_reduce joins the processes of torch.distributed, ...
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            raise InvalidConfig(
                "all_reduce joins the processes of torch.distributed, and there is no process "
                'group: start the program with torchrun, and call init_process_group("gloo") first'
            )
        if distributed.get_rank(group) < 0:
            raise InvalidConfig(
                f"all_reduce: process {distributed.get_rank()} is not in the group that it was "
                "given; call it in the processes of the group alone, or with group=None in all"
            )
        everyone: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(everyone, (self._alike(), self.state_dict()), group)
        shares = [share for _, share in everyone]
        _check_alike([alike for alike, _ in everyone])
        if any(share.get("reduced") for share in shares):
            raise InvalidConfig(
                "all_reduce was called before, and would count every process's data again: "
                "calibrate on all of it first, or with another quantizer"
            )
        if not any(share["state"]["batches"] for share in shares):
            raise NotCalibrated(
                "all_reduce: no process has seen data; run it through the proxy that "
                "quantizer.calib(model) returns"
            )
        with self.state.lock:
            self._merge(shares, QuantState())
            self._reduced = True

    def _alike(self) -> dict[str, Any]:
        """What every process has to have before ranges are joined."""
        try:
            settings = self._to_config(None)
        except InvalidConfig:  # functions and local classes are no data that can be compared
            settings = {}
        return {
            **settings,
            "fallen_back": dict(self.fallen_back),
            "summary": summary_data(self._summary),
        }

    def _merge(self, parts: Sequence[Mapping[str, Any]], first: QuantState | None = None) -> None:
        """Take in ``parts`` beside ``first``, None for what was recorded here."""
        state = self.state.copied() if first is None else first
        fingerprint = dict(state.fingerprint)
        for i, saved in enumerate(parts):
            theirs, part = check_saved(saved)[0], QuantState()
            try:
                part.load_state_dict(saved["state"])
                if fingerprint and theirs:
                    check_fingerprint(fingerprint, theirs)
                state.merge(part)
            except (InvalidConfig, NotCalibrated) as error:
                raise InvalidConfig(f"calibration {i} cannot be merged: {error}") from error
            fingerprint = fingerprint or theirs
        self.state.take(state)
        self.state.fingerprint = fingerprint
        self._reduced = self._reduced or any(saved.get("reduced", False) for saved in parts)
        self.plan = QuantPlan()

    def save_summary(self, path: str | os.PathLike[str]) -> None:
        """Write the last plan and its ranges as JSON, to be read, edited and given back.

        Raises:
            NotCalibrated: nothing was quantized yet.
            InvalidConfig: the path cannot be written.

        >>> import torch
        >>> from torch import nn
        >>> from torch_quant import Quantizer
        >>> model, quantizer = nn.Embedding(4, 2), Quantizer("reference")
        >>> _ = quantizer.quantize(model, example_inputs=torch.tensor([0]))
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     quantizer.save_summary(f"{folder}/summary.json")
        """
        if not self.plan:
            raise NotCalibrated("there is no plan yet: quantizer.quantize(model) first")
        save_summary(path, self.plan, self.state, self._captured_by)

    def load_summary(self, path: str | os.PathLike[str]) -> None:
        """Take formats, ranges and what stays in float from a summary, edited or not.

        It goes before the configuration given to the constructor, site by site. A model that was
        not captured yet is captured in the parts that the summary has, unless ``capture=`` says it.

        Raises:
            InvalidConfig: the file holds a mistake; or, when used, what the model does not have.
                Both say in which line.

        >>> from torch_quant import Quantizer
        >>> Quantizer("reference").load_summary("missing.json")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        torch_quant.errors.InvalidConfig: cannot read the summary missing.json: ...
        """
        summary = load_summary(path)
        summary.apply_to(self.state)
        self._summary = summary


def _check_alike(everyone: Sequence[Mapping[str, Any]]) -> None:
    """Raise :class:`InvalidConfig` unless all processes have the same; by their ranks."""
    first = everyone[0]
    for rank, theirs in enumerate(everyone):
        for name in {**first, **theirs}:
            if first.get(name) != theirs.get(name):
                both = [f"{x.get(name)!r:.200}" for x in (theirs, first)]
                raise InvalidConfig(
                    f"all_reduce: process {rank} of the group has {name}={both[0]}, and process 0 "
                    f"has {both[1]}: give the quantizers of all processes the same settings"
                )
