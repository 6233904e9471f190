"""The facade: proxies out of a float model, and everything learned along the way."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant.backends import Backend, best_backend
from torch_quant.backends.lowering import Lowering
from torch_quant.backends.quantized import QuantizedRegion
from torch_quant.config import ModuleFilter, ObserverLike, Overrides, QConfig, check_names
from torch_quant.core.plan import QuantPlan
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import (
    BackendUnavailable,
    InvalidConfig,
    NotCalibrated,
    QuantError,
    UnsupportedOp,
)
from torch_quant.graph.annotate import annotate, modules_of, qconfig_of
from torch_quant.graph.calls import Call
from torch_quant.graph.capture import Executor, Region
from torch_quant.graph.export import CapturedGraph
from torch_quant.io.summary import load_summary, save_summary
from torch_quant.model import CapturedModel, check_model, check_same, run_example
from torch_quant.observers import DEFAULT_OBSERVER, Observer, observer_class
from torch_quant.passes.prepare import insert_observers
from torch_quant.report.coverage import Coverage
from torch_quant.state import QuantState

__all__ = ["CalibModel", "Quantizer"]

logger = logging.getLogger("torch_quant")


class Quantizer:
    """Makes proxies of a float model and keeps what they learn. The model is never changed.

    Args:
        backend: where the quantized model will run, ``Backend.ONEDNN`` or its name; None for the
            fastest that this machine has.
        qconfig: formats and observers where the backend's own should not be used.
        overrides: exceptions to it, by site or module name (globs too), module class or op type;
            None as a value leaves what matches in float.
        module_filter: which sites to quantize at all.

    Raises:
        InvalidConfig: an unknown backend, or settings that contradict each other.
        BackendUnavailable: the backend does not run on this machine.

    >>> import torch
    >>> model = torch.nn.Linear(4, 2)
    >>> quantizer = Quantizer(backend="reference")
    >>> calib_model = quantizer.calib(model)
    >>> _ = calib_model(torch.ones(8, 4))
    >>> quantizer.quantize(model)(torch.ones(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        backend: Backend | str | None = None,
        *,
        qconfig: QConfig | None = None,
        overrides: Overrides | None = None,
        module_filter: ModuleFilter | None = None,
    ) -> None:
        self.backend = _usable(backend)
        self.qconfig = qconfig or QConfig()
        self.overrides = dict(overrides or {})
        self.module_filter = module_filter or ModuleFilter()
        for key, value in self.overrides.items():
            if value is not None and not isinstance(value, QConfig):
                raise InvalidConfig(f"override {key!r} is {value!r}; expected a QConfig or None")
        self.state = QuantState()
        self.plan = QuantPlan()
        self._edits = QuantPlan()
        self._fingerprint: dict[str, str] | None = None
        self._models: weakref.WeakKeyDictionary[nn.Module, CapturedModel]
        self._models = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"Quantizer({self.backend!r}, {self.state.batches} batches seen, {self.plan!r})"

    # Proxies

    def calib(self, model: nn.Module, example_inputs: Any = None) -> CalibModel:
        """A proxy that returns what ``model`` returns, bit for bit, and records ranges.

        Args:
            model: a float32 model in any mode; it is captured as in eval mode.
            example_inputs: a tensor, a tuple or a dict of keywords to capture the model with now,
                without recording them; by default it is captured at the first call.

        Raises:
            InvalidConfig: the model cannot be taken, or a filter names what it does not have.
            CaptureFailed: ``example_inputs`` do not fit the model.
            NotCalibrated: this quantizer holds ranges of another model.
        """
        captured = self._captured(model)
        self._check_names(model)
        if example_inputs is not None:
            run_example(captured, example_inputs)
        return CalibModel(self, captured, model)

    def quantize(
        self,
        model: nn.Module,
        *,
        backend: Backend | str | None = None,
        example_inputs: Any = None,
    ) -> QuantizedRegion:
        """The quantized model, on real kernels: call it, trace it, export it, copy it, save it.

        Args:
            model: the model that was calibrated; its current weights are used.
            backend: another backend than the quantizer's; needs no second calibration.
            example_inputs: as for :meth:`calib`, for a quantizer whose ranges were loaded.

        Raises:
            NotCalibrated: no data was seen, or the model has changed since.
            UnsupportedOp: nothing in the model can be quantized.
        """
        chosen = self.backend if backend is None else _usable(backend)
        captured = self._captured(model, chosen)
        if example_inputs is not None:
            run_example(captured, example_inputs)
        if not captured.region.called:
            raise NotCalibrated(
                "the model was never run: call quantizer.calib(model) on calibration data first"
                if self.state.batches == 0
                else "this model object is not captured yet (the ranges were loaded, or it is a "
                "copy): quantizer.quantize(model, example_inputs=...)"
            )
        plan = self._plan(model, captured, chosen)
        if not any(site.quantized for site in plan.values()):
            reasons = {site.reason for site in plan.values()}
            raise UnsupportedOp(
                "nothing in the model can be quantized: "
                + ("; ".join(sorted(reasons)) or "it has no product of float tensors")
                + ". print(quantizer.coverage(model)) lists every operator"
            )
        needs_data = any(site.quantized and site.activation for site in plan.values())
        if needs_data and self.state.batches == 0:
            raise NotCalibrated(
                "no calibration data was seen: run it through quantizer.calib(model)"
            )
        weight_grid = partial(self._weight_grid, captured, model)
        lowering = Lowering(captured, plan, chosen, self.state.qparams, weight_grid)
        quantized = lowering.run()
        quantized.description = (
            f"{chosen!r}, {len(plan.quantized)} of {len(plan)} sites in int8, "
            f"{plan.coverage:.1%} of the multiply-accumulates"
        )
        self.plan = quantized.plan = plan
        quantized.calibration = self.state.describe()
        logger.info("quantized: %s", quantized.description)
        return quantized

    def coverage(
        self,
        model: nn.Module,
        example_inputs: Any = None,
        *,
        backend: Backend | str | None = None,
    ) -> Coverage:
        """What share of the model's multiply-accumulates runs in int8 and, per op, why not.

        Args:
            model: any model; it need not be calibrated.
            example_inputs: as for :meth:`calib`, needed if the model was not run yet.
            backend: another backend than the quantizer's.

        Returns:
            A report; ``print`` shows its tables.
        """
        chosen = self.backend if backend is None else _usable(backend)
        captured = self._captured(model, chosen)
        if example_inputs is not None:
            run_example(captured, example_inputs)
        if not captured.region.called:
            raise NotCalibrated(
                "the model was not captured yet: quantizer.coverage(model, example_inputs=...)"
            )
        glue = [(r.path or "(root)", r.failure) for r in captured.region.walk() if r.failure]
        never = [
            (r.path, "never called")
            for r in captured.region.walk()
            if not r.called and any(True for _ in r.module.parameters())
        ]
        float_ops = {op for prepared in captured.graphs() for op in prepared.float_ops}
        return Coverage(
            self._plan(model, captured, chosen),
            repr(chosen),
            tuple(sorted(float_ops)),
            tuple(glue + never),
        )

    # State

    def state_dict(self) -> dict[str, Any]:
        """Ranges and what they belong to: tensors and plain values, for ``torch.save``."""
        return {"state": self.state.state_dict(), "model": dict(self._fingerprint or {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back :meth:`state_dict`; raises :class:`InvalidConfig` if it is something else."""
        if set(state) != {"state", "model"}:
            raise InvalidConfig(f"not a Quantizer state: it has the entries {sorted(state)}")
        self.state.load_state_dict(state["state"])
        self._fingerprint = dict(state["model"]) or None

    def save_summary(self, path: str | os.PathLike[str]) -> None:
        """Write the last plan and its ranges as JSON, to be read, edited and given back.

        Raises:
            NotCalibrated: nothing was quantized yet.
            InvalidConfig: the path cannot be written.
        """
        if not self.plan:
            raise NotCalibrated("there is no plan yet: quantizer.quantize(model) first")
        save_summary(path, self.plan, self.state)

    def load_summary(self, path: str | os.PathLike[str]) -> None:
        """Take formats, ranges and what stays in float from a summary, edited or not.

        It goes before the configuration given to the constructor, site by site.

        Raises:
            InvalidConfig: the file is no summary; or, when used, it names unknown sites.
        """
        summary = load_summary(path)
        summary.apply_to(self.state)
        self._edits = summary.plan

    # Inside

    def _captured(self, model: nn.Module, backend: Backend | None = None) -> CapturedModel:
        backend = backend or self.backend
        if isinstance(model, (CalibModel, QuantizedRegion)):
            raise InvalidConfig("this is a proxy; give the float model it was made from")
        check_model(model, backend.devices, repr(backend))
        if self._fingerprint is not None:
            check_same(self._fingerprint, model)
        captured = self._models.get(model)
        if captured is None:
            captured = self._models[model] = CapturedModel(model)
        captured.refresh(model)
        return captured

    def _plan(self, model: nn.Module, captured: CapturedModel, backend: Backend) -> QuantPlan:
        plan = annotate(
            captured.sites(),
            model,
            backend.placement(),
            qconfig=self.qconfig,
            overrides=self.overrides,
            module_filter=self.module_filter,
        )
        check_names(self._edits, plan, "summary site")
        return plan.edited(self._edits, backend.placement())

    def _check_names(self, model: nn.Module) -> None:
        """A misspelt module name should not wait for the first batch to be found."""
        known = [name for name, _ in model.named_modules() if name]
        for pattern in self.module_filter.names:
            if pattern.split(".")[0] in {name.split(".")[0] for name in known}:
                continue  # may name an operator inside a module; checked once captured
            check_names([pattern], known, "ModuleFilter name")

    def _observer_of(self, captured: CapturedModel, model: nn.Module, key: str) -> Observer:
        """A new observer for a tensor: that of the first site that uses it."""
        for prepared in captured.graphs():
            for site, _ in prepared.sites:
                if key in site.keys:
                    config = qconfig_of(site, modules_of(model, site), self.qconfig, self.overrides)
                    choice = config.observer if config else None
                    return _make(choice or DEFAULT_OBSERVER, None)
        raise QuantError(f"no site uses the tensor {key}")

    def _weight_grid(
        self, captured: CapturedModel, model: nn.Module,
        name: str, weight: Tensor, spec: QuantSpec, axis: int,
    ) -> QParams:  # fmt: skip
        site = next(site for site, _ in captured.sites() if site.name == name)
        config = qconfig_of(site, modules_of(model, site), self.qconfig, self.overrides)
        observer = _make(
            (config or self.qconfig).weight_observer, axis if spec.per_channel else None
        )
        try:
            observer.observe(weight)
        except QuantError as error:
            raise QuantError(f"the weight of {name}: {error}; mend the model's weights") from error
        return observer.qparams(spec)


class CalibModel(nn.Module):
    """The proxy that :meth:`Quantizer.calib` makes. Not to be made by hand."""

    _executor: Executor

    def __init__(self, quantizer: Quantizer, captured: CapturedModel, model: nn.Module) -> None:
        super().__init__()
        self._quantizer, self._captured = quantizer, captured
        self._model = weakref.ref(model)
        self._reset()
        self.eval()

    def _reset(self) -> None:
        self._version = self._captured.version
        self._graphs: dict[int, Callable[..., Any]] = {}
        # No submodule: what is done to the proxy (double(), train()) must not reach the parameters.
        self.__dict__["_executor"] = Executor(self._captured.region, self._run)

    def train(self, mode: bool = True) -> CalibModel:
        """Stays in eval mode, as it was captured."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the float model and records its ranges; same inputs and outputs as the model."""
        quantizer = self._quantizer
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.dim() and x.shape[0] == 0:
                raise QuantError(
                    f"calibration batch {quantizer.state.batches} is empty: an input has shape "
                    f"{tuple(x.shape)}; leave it out"
                )
        if (model := self._model()) is not None:
            self._captured.refresh(model)
        if self._version != self._captured.version:
            self._reset()
        with quantizer.state.batch():
            outputs = self._executor(*args, **kwargs)
        quantizer._fingerprint = self._captured.fingerprint
        return outputs

    def _run(self, region: Region, graph: CapturedGraph, call: Call) -> Any:
        if id(graph) not in self._graphs:
            prepared = self._captured.prepared(region, graph)
            self._graphs[id(graph)] = insert_observers(prepared, self._observe)
        outputs = self._graphs[id(graph)](*call.tensors)
        if graph.exact:
            return graph.output(outputs)
        args, kwargs = call.rebuild(call.tensors)
        return region.module(*args, **kwargs)

    def _observe(self, key: str, x: Tensor) -> None:
        quantizer, captured = self._quantizer, self._captured
        make = partial(quantizer._observer_of, captured, captured.region.module, key)
        quantizer.state.observe(key, x, make)


def _usable(backend: Backend | str | None) -> Backend:
    chosen = best_backend() if backend is None else Backend.of(backend)
    if reason := chosen.unavailable():
        raise BackendUnavailable(f"{chosen!r} does not run here: {reason}")
    return chosen


def _make(choice: ObserverLike, axis: int | None) -> Observer:
    factory = observer_class(choice) if isinstance(choice, str) else choice
    return factory(axis)
