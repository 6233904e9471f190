"""What a quantizer says of a model: which setting decided what, how much is quantized, how fast."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from torch_quant.backends import Backend, available_backends, usable_backend
from torch_quant.choices import FASTEST
from torch_quant.comparing import compared, listed
from torch_quant.convert.quantized import QuantizedModule
from torch_quant.core.plan import QuantPlan
from torch_quant.core.telling import told_together
from torch_quant.errors import InvalidConfig, UnsupportedOp
from torch_quant.explain import Explanation
from torch_quant.graph.progress import hidden
from torch_quant.graph.running import frozen
from torch_quant.profiling import checked_seconds, profiled
from torch_quant.qat.model import QatModel
from torch_quant.quantizer_training import QuantizerTraining
from torch_quant.regions import Measure, find_slower, measured_regions, stopwatch
from torch_quant.report.comparison import Comparison
from torch_quant.report.coverage import Coverage
from torch_quant.report.regions import Regions
from torch_quant.report.speed import Profile

__all__ = ["QuantizerReports", "comparing_bar"]

logger = logging.getLogger("torch_quant")


class QuantizerReports(QuantizerTraining):
    """The public methods of a :class:`Quantizer` that report."""

    regions: Regions | None = None
    """What ``quantize(model, never_slower=True)`` measured last."""
    measured: Profile | None = None
    """What ``quantize(model, backend="fastest")`` measured last."""

    def explain(
        self,
        site: str,
        model: nn.Module | None = None,
        example_inputs: Any = None,
        *,
        backend: Backend | str | None = None,
    ) -> Explanation:
        """Which setting decided what about a site, and what the backend made of it.

        Args:
            site: its name, as :meth:`coverage` and summaries have it.
            model: the model; the one that this quantizer has captured by default.
            example_inputs: as for :meth:`calib`, needed if the model was not run yet.
            backend: another backend than the quantizer's.

        Raises:
            InvalidConfig: there is no such site; or not one model that was captured.

        >>> import torch
        >>> from torch_quant import QConfig, Quantizer
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> quantizer = Quantizer("reference", overrides={"1": None, "op:linear": QConfig()})
        >>> _ = quantizer.calib(model)(torch.ones(8, 4))
        >>> quantizer.explain("1")
        1 (linear) on Backend.REFERENCE: float32, left in float by an override
          quantized       no                           override '1'
                          left in float by an override
          overrides that cover it, the first holds: '1', 'op:linear'
        """
        return self._explain(site, model, example_inputs, backend)

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

        >>> import torch
        >>> from torch_quant import Quantizer
        >>> Quantizer("reference").coverage(nn.Linear(4, 2), torch.ones(8, 4)).share
        1.0
        """
        return self._coverage(model, example_inputs, backend)

    def compare(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        backend: Backend | str | None = None,
        progress: bool = True,
    ) -> Comparison:
        """Where the error comes in: the result of each layer beside float, all before it quantized.

        :meth:`sensitivity` tells what each layer alone does to the outputs; this is what becomes of
        the errors of all of them on the way.

        Args:
            model: the model that was calibrated.
            batches: inputs, each as for :meth:`calib`. Memory is that of one batch's activations.
                What is given at padding counts as all else does: give texts without any.
            backend: another backend than the quantizer's.
            progress: show a bar on stderr.

        Returns:
            A report; ``print`` shows its table, ``comparison.worst`` has those first that add most.

        Raises:
            NotCalibrated: no data was seen, or the model has changed since.
            InvalidConfig: there are no batches.

        >>> import torch
        >>> from torch_quant import Quantizer
        >>> model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), torch.rand(16, 8)
        >>> quantizer = Quantizer("reference")
        >>> _ = quantizer.calib(model)(x)
        >>> found = quantizer.compare(model, [x])
        >>> [each.site for each in found], found.outputs == found.layers[-1].after
        (['0', '1'], True)
        """
        kept = listed(batches, "compare")
        example = kept[0] if kept else None
        chosen = self.backend if backend is None else usable_backend(backend)
        with frozen(model):
            quantized = super()._quantized(model, chosen, copy.deepcopy(example), False)
            with self.state.lock:
                shown = comparing_bar(progress)
                return compared(self._session(model, chosen), chosen, quantized, kept, shown)

    def profile(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        backends: Iterable[Backend | str] | None = None,
        seconds: float = 5.0,
        compiled: bool = False,
    ) -> Profile:
        """How long a call takes on this machine: in float, and quantized on each backend.

        All are called in turns in this process, with PyTorch's present number of threads. A median
        holds for these inputs: give the sizes that the model will serve.

        Args:
            model: the model that was calibrated.
            example_inputs: as for :meth:`calib`. Times and SQNR are those of padding too.
            backends: which; by default each that runs here and has kernels of its own.
            seconds: about how long to measure, without what quantizing and compiling take.
            compiled: also the float model by ``torch.compile``, which needs a C++ compiler.

        Returns:
            A report; ``print`` shows its table, ``profile.fastest`` is the fastest backend and
            ``profile.gain`` how many times faster it is than the fastest float model.

        Raises:
            NotCalibrated: no data was seen, or the model has changed since.
            BackendUnavailable: one of ``backends`` does not run on this machine.

        >>> import torch
        >>> from torch_quant import Quantizer
        >>> model, x, quantizer = nn.Linear(64, 64), torch.ones(8, 64), Quantizer("reference")
        >>> _ = quantizer.calib(model)(x)
        >>> profile = quantizer.profile(model, x, backends=["reference"], seconds=0.01)
        >>> [run.name for run in profile]
        ['float32', 'bfloat16', 'quantized, Backend.REFERENCE']
        """
        if backends is None:
            chosen = [each for each in available_backends() if each.has_kernels]
        else:
            chosen = [usable_backend(each) for each in backends]
        made: dict[str, nn.Module | str] = {}
        with frozen(model):  # what it counts and keeps stays as it was
            for each in chosen:
                try:
                    example = copy.deepcopy(example_inputs)
                    made[each.name] = super()._quantized(model, each, example, False)
                except UnsupportedOp as error:
                    made[each.name] = str(error)
            names = {each.name: f"quantized, {each!r}" for each in chosen}
            return profiled(
                model, made, example_inputs, seconds=seconds, compiled=compiled, names=names
            )

    def profile_regions(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        by: str = "operator",
        backend: Backend | str | None = None,
        seconds: float = 20.0,
        measure: Measure | None = None,
        progress: bool = True,
    ) -> Regions:
        """What it gains to quantize each part of a model, with the quantizers around it.

        Each part is measured by the whole model, quantized with it and without it, in turns.

        Args:
            model: the model that was calibrated.
            example_inputs: as for :meth:`calib`, of the sizes that the model will serve.
            by: ``"operator"``: operators of one kind and size are one part; or ``"module"``.
            backend: another backend than the quantizer's.
            seconds: about how long to measure, without what quantizing takes.
            measure: how models are measured, as for :meth:`quantize`; here, by default.
            progress: whether to show a progress bar.

        Returns:
            A report; ``print`` shows its table.

        Raises:
            NotCalibrated: no data was seen, or the model has changed since.
            InvalidConfig: ``by`` or ``seconds`` is none of what may be.

        >>> import torch
        >>> from torch_quant import Quantizer
        >>> model, x, quantizer = nn.Linear(64, 64), torch.ones(8, 64), Quantizer("reference")
        >>> _ = quantizer.calib(model)(x)
        >>> report = quantizer.profile_regions(model, x, seconds=0.01)
        >>> [region.name for region in report]
        ['linear 64x64 0.0328M']
        """
        with self.state.lock:
            chosen, session = self._ready(model, backend, example_inputs, "profile_regions")
            watch = measure or stopwatch(example_inputs, checked_seconds(seconds) / 20)
            with frozen(model), told_together():
                return measured_regions(session, chosen, by, watch, progress=progress)

    def _without_slower(
        self,
        model: nn.Module,
        backend: Backend | str | None,
        example_inputs: Any,
        how: bool | Measure,
        seconds: float,
        progress: bool,
    ) -> Backend | str | None:
        """Find what is slower quantized than in float; returns the backend that was measured."""
        if how is not True and not callable(how):
            raise InvalidConfig(
                f"never_slower={how!r}: expected True, False, or a function that measures models"
            )
        if isinstance(model, QatModel):
            raise InvalidConfig(
                "never_slower measures a float model, and this is one in training: "
                "quantize(model, never_slower=True, example_inputs=...) first, then qat(model)"
            )
        if example_inputs is None:
            raise InvalidConfig(
                "quantize(model, never_slower=True) measures on inputs: give example_inputs, of "
                "the sizes that the model will serve"
            )
        if backend == FASTEST:
            self._quantized(model, backend, example_inputs, False)
            assert self.measured is not None
            backend = self.measured.fastest
        each = checked_seconds(seconds) / 20
        watch = stopwatch(example_inputs, each) if how is True else how
        with self.state.lock:
            chosen, session = self._ready(model, backend, example_inputs, "quantize")
            with frozen(model), told_together():
                found, self.regions = find_slower(session, chosen, watch, progress=progress)
        self.slower = {**self.slower, chosen.name: found}
        self.plan = QuantPlan()
        if self.regions.against.certain:
            logger.warning(
                "the quantized model is slower than float on these inputs, by %.3g of %.3g ms, "
                "whatever of the sites that no override names is taken back\n%s",
                self.regions.against.milliseconds, self.regions.float32, self.regions,
            )  # fmt: skip
        else:
            logger.info("never slower\n%s", self.regions)
        return backend

    def _quantized(
        self,
        model: nn.Module,
        backend: Backend | str | None,
        example_inputs: Any,
        share_float_weights: bool,
    ) -> QuantizedModule:
        if backend != FASTEST:
            return super()._quantized(model, backend, example_inputs, share_float_weights)
        if example_inputs is None:
            raise InvalidConfig(
                'quantize(model, backend="fastest") measures on inputs: give example_inputs, of '
                "the sizes that the model will serve"
            )
        self.measured = found = self.profile(model, example_inputs)
        if found.fastest is None:
            raise UnsupportedOp(f"the model is quantized on no backend of this machine:\n{found}")
        if found.gain < 1.0:
            logger.warning(
                "the fastest quantized model is slower than float, %.2f times as fast on %s: "
                "print(quantizer.measured)",
                found.gain,
                found.fastest,
            )
        return super()._quantized(model, found.fastest, example_inputs, share_float_weights)


def comparing_bar(wanted: bool) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """What goes through batches, with a bar on stderr if that is wanted."""
    from tqdm import tqdm

    def shown(each: Iterable[Any]) -> Iterable[Any]:
        return tqdm(each, desc="comparing", unit="batch", disable=hidden(wanted))

    return shown
