"""Calls of a quantized model that it has no graph for: they are captured when they come."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from torch_quant.backends import Backend
from torch_quant.convert.lowering import Lowering
from torch_quant.convert.quantized import QuantizedModule
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.core.naming import did_you_mean
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import CaptureFailed, InvalidConfig
from torch_quant.graph.calls import Call
from torch_quant.graph.facts import attributes
from torch_quant.graph.kinds import Kind
from torch_quant.graph.running import CAPTURING
from torch_quant.passes.prepare import Prepared
from torch_quant.session import Session, Snapshot
from torch_quant.state import weight_checksums

__all__ = ["UnseenCalls", "checked_choice"]

logger = logging.getLogger("torch_quant")

CHOICES = ("capture", "error")
NO_RANGES = "no calibration data passed it in this kind of call"


def checked_choice(choice: str) -> str:
    """``choice``; raises :class:`InvalidConfig` unless it is one of what can be done."""
    if choice not in CHOICES:
        hint = did_you_mean(str(choice), CHOICES)
        raise InvalidConfig(f'unseen_calls={choice!r}; expected "capture" or "error"{hint}')
    return choice


class UnseenCalls:
    """Makes the graphs that a quantized model lacks, with the ranges and settings it was made with.

    The float model and its quantizer are needed for that, and only weak references are kept. A copy
    of the quantized model shares this; a pickled one has None in its place.

    Args:
        session: the quantizer and the float model, as they are when the quantized model is made;
            the model's graphs are not added to.
        backend: where the quantized model runs.
        plan: of the quantized model, whose transforms its sites keep; None to settle them anew.
    """

    _changed: ClassVar[str] = "the float model has changed since it was quantized"

    def __init__(self, session: Session, backend: Backend, plan: QuantPlan | None = None) -> None:
        model = session.model
        self._captured, self._model = weakref.ref(session.captured), weakref.ref(model)
        self._learned = Snapshot.of(session.owner, backend)
        self._facts, self._plan = self._present(model), plan

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()

    def attend(self, quantized: nn.Module) -> None:
        """Serve every module of a quantized model."""
        for submodule in quantized.modules():
            if isinstance(submodule, QuantizedModule):
                submodule.quantization.unseen = self

    def _lowering(self, session: Session) -> Lowering:
        """How the new graph is lowered, by the quantizer as it was."""
        return session.lowering(transforms=self._plan)

    @staticmethod
    def _present(model: nn.Module) -> tuple[Any, ...]:
        return weight_checksums(model), attributes(model)

    def graph(
        self, path: str, call: Call, served: Sequence[Kind]
    ) -> tuple[QuantizedGraph, nn.Module]:
        """A graph of the module at ``path`` for calls like ``call``, and the float module there.

        Args:
            path: the module.
            call: what the graph has to serve.
            served: the kinds that the quantized module has graphs for.

        Raises:
            CaptureFailed: there can be none; says why.
        """
        captured, model = self._captured(), self._model()
        if captured is None or model is None:
            raise CaptureFailed("the float model or its quantizer no longer exists")
        with CAPTURING, torch.inference_mode(False), torch.no_grad():
            if self._present(model) != self._facts:
                raise CaptureFailed(self._changed)
            captured.root.at(path)  # its hooks are taken off once, and not by a copy
            twin = captured.copied()
            submodule = twin.root.at(path)
            if submodule is None:
                raise CaptureFailed("the float model was captured anew since")
            kind, graph = submodule.add(call, served)
            lowering = self._lowering(Session(self._learned, twin, model))
            missing = self._missing(lowering.plan, twin.prepared(submodule, graph))
            lowering = replace(lowering, plan=lowering.plan.without(missing, NO_RANGES))
            made = lowering.quantized_graph(submodule, kind, graph)
            made.plan = lowering.plan.declined(lowering.declined).of(
                {site.name for site, _ in twin.prepared(submodule, graph).sites},
                twin.prepared(submodule, graph).float_ops,
            )
        where = path or "the model"
        if missing:
            logger.warning(
                "%s: a call with %s is of a kind that was not calibrated; no ranges are known for "
                "%s, which such calls run in float. Run quantizer.calib(model) on such inputs too, "
                "then quantize again; Quantizer(unseen_calls='error') refuses such calls",
                where,
                ", ".join(call.describe()),
                ", ".join(missing),
            )
        else:
            logger.info("captured %s for another kind of call", where)
        return made, submodule.module

    def _missing(self, plan: QuantPlan, prepared: Prepared) -> list[str]:
        """Quantized sites of a graph that read or store a tensor without a range."""
        found = []
        for site, _ in prepared.sites:
            entry = plan[site.name]
            if entry.quantized and entry.needs_ranges:
                result = [entry.quantized_output] if entry.quantized_output else []
                keys = [*site.inputs, *site.internals, *result]
                if any(self._learned.state.find(key) is None for key in keys):
                    found.append(site.name)
        return list(dict.fromkeys(found))
