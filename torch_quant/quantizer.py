"""The facade: proxies out of a float model, and everything learned along the way."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from torch_quant.amp.allocation import Allocation
from torch_quant.amp.candidates import checked_candidates
from torch_quant.amp.fallback import precision_of
from torch_quant.amp.optimization import Optimization
from torch_quant.amp.options import AmpOptions, LossFn
from torch_quant.amp.padding import Mask
from torch_quant.amp.proxy import AmpModel, Latency
from torch_quant.amp.report import SensitivityReport
from torch_quant.backends import Backend
from torch_quant.config import OverrideKey, QConfig
from torch_quant.convert.quantized import QuantizedModule
from torch_quant.core.plan import QuantPlan
from torch_quant.proxies.calib import CalibModel
from torch_quant.quantizer_page import QuantizerPage
from torch_quant.regions import Measure
from torch_quant.rounding import Rounding

__all__ = ["Quantizer"]

logger = logging.getLogger("torch_quant")


class Quantizer(QuantizerPage):
    """Makes proxies of a float model and keeps what they learn. The model is never changed.

    Args:
        choice: a backend or a QConfig, the same as ``backend=`` or ``qconfig=``:
            ``Quantizer("onednn")``, ``Quantizer(recipes.int8_dynamic())``,
            ``Quantizer("int8_dynamic")``.
        backend: where the quantized model will run, ``Backend.ONEDNN`` or its name; None for the
            first of ``available_backends()``. ``quantize(model, backend="fastest")`` measures.
        qconfig: formats and observers where the backend's own should not be used, or the name of a
            recipe.
        overrides: exceptions to it, by site or module name (globs too), module class or op type;
            None or ``"float"`` as a value leaves what matches in float.
        module_filter: which sites to quantize at all.
        unseen_calls: whether a quantized model captures kinds of calls that were not calibrated,
            ``"capture"``, or raises :class:`CaptureFailed` for them, ``"error"``.
        dynamic: the dimensions that one graph leaves free, ``{"pixel_values": [0]}``, of inputs as
            messages name them; other sizes are captured when first seen. Other inputs, and a model
            in pieces, take any size.
        capture: ``"whole"``, the model as one graph if it exports; ``"modules"``, each layer with a
            weight as a graph, which takes seconds for a language model; or names and globs of
            modules that are a graph each. What is no graph stays your own Python, in float. None
            for ``"modules"`` where ``qconfig`` asks for no ranges of activations (weights alone,
            dynamic formats), else ``"whole"``.

    Raises:
        InvalidConfig: an unknown backend, settings that contradict each other, or one given twice.
        BackendUnavailable: the backend does not run on this machine.

    >>> import torch
    >>> model = torch.nn.Linear(4, 2)
    >>> quantizer = Quantizer(backend="reference")
    >>> calib_model = quantizer.calib(model)
    >>> _ = calib_model(torch.ones(8, 4))
    >>> quantizer.quantize(model)(torch.ones(3, 4)).shape
    torch.Size([3, 2])
    """

    def set(self, pattern: OverrideKey, config: QConfig | str | None) -> None:
        """Add an override, or put it in the place of that with the same key.

        It may come after calibration: formats and what stays in float follow it. Observers and
        transforms need data, so they have to be set before.

        Args:
            pattern: a key of ``overrides``: a name, a glob, ``re:`` and a regular expression, an op
                type, a module class, or a function of a :class:`SiteInfo`.
            config: its configuration, or the name of a recipe; None or ``"float"`` leaves what it
                covers in float.

        Raises:
            InvalidConfig: it is no such key or no QConfig, or a name that a model which this
                quantizer has captured does not have. Nothing changes then.

        >>> quantizer = Quantizer("reference")
        >>> quantizer.set("op:embedding", None)
        >>> from torch_quant import SmoothQuant
        >>> quantizer.set(r"re:encoder\\.layer\\.\\d+", QConfig(transforms=[SmoothQuant(0.8)]))
        """
        self._set(pattern, config)

    def calib(self, model: nn.Module, example_inputs: Any = None) -> CalibModel:
        """A proxy that returns what ``model`` returns, bit for bit, and records ranges.

        Args:
            model: a float32 model in any mode; it is captured as in eval mode.
            example_inputs: captured with now, unrecorded: a tuple of positional inputs, a dict of
                keywords, or the one input: a tensor, a list, a dict as ``(batch,)``.

        Raises:
            InvalidConfig: the model cannot be taken, or a filter names what it does not have.
            CaptureFailed: ``example_inputs`` do not fit the model.
            NotCalibrated: this quantizer holds ranges of another model.

        >>> model, x = nn.Linear(4, 2), torch.ones(8, 4)
        >>> torch.equal(Quantizer("reference").calib(model)(x), model(x))
        True
        """
        return self._calib(model, example_inputs)

    def amp(
        self,
        model: nn.Module,
        *,
        metric: str = "output",
        loss_fn: LossFn | None = None,
        max_batches: int | None = None,
        example_inputs: Any = None,
        seed: int = 0,
        candidates: Mapping[str, QConfig] | Iterable[QConfig] | None = None,
        mask: Mask | None = None,
    ) -> AmpModel:
        """A proxy that returns what ``model`` returns, bit for bit, and records sensitivities.

        Args:
            model: the model that was calibrated.
            metric: ``"output"``, the noise that a site adds to the outputs, by their gradient along
                random directions; or ``"sqnr"``, that in its own result, without gradient.
            loss_fn: ``loss_fn(outputs, batch)`` gives a scalar to take the gradient of instead.
            max_batches: record this many batches and pass on what comes after; None for all.
            example_inputs: as for :meth:`calib`.
            seed: of the random directions.
            candidates: other configurations to try at each site for :meth:`allocate`, in a list or
                by names of yours.
            mask: the input, by name, or a function of the batch that has 1 at real positions of
                padded batches, ``[rows, length]``: these alone count then.

        Raises:
            NotCalibrated: no data was seen, or the model has changed since.
            InvalidConfig: an unknown metric; candidates, or a mask, that are none.

        >>> model, x, quantizer = nn.Linear(4, 2), torch.ones(8, 4), Quantizer("reference")
        >>> _ = quantizer.calib(model)(x)
        >>> torch.equal(quantizer.amp(model)(x), model(x))
        True
        """
        others = checked_candidates(candidates)
        options = AmpOptions(metric, loss_fn, max_batches, seed, others, mask)
        return self._amp(model, options, example_inputs)

    def allocate(
        self,
        amp_model: AmpModel,
        *,
        bits_per_weight: float | None = None,
        min_sqnr: float | None = None,
    ) -> Allocation:
        """Give each site the candidate that the model's outputs can best bear.

        Give one of ``bits_per_weight`` and ``min_sqnr``. What is chosen becomes an override of the
        site, so :meth:`quantize`, :meth:`round_weights` and :meth:`to_config` follow it.

        Args:
            amp_model: a proxy of :meth:`amp` with ``candidates`` that data was run through.
            bits_per_weight: the mean that weights may take, scales included; the noise at the
                outputs is then the least.
            min_sqnr: output SQNR, dB, that the sum of the sites' noises must not fall below; the
                bits are then the fewest. First-order: measure the result.

        Returns:
            What was chosen; ``print`` shows a table.

        Raises:
            NotCalibrated: no data was run through the proxy, or it knows no noise at the outputs.
            InvalidConfig: it has no candidates; none or both goals; a goal out of reach.

        >>> from torch_quant import recipes
        >>> model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 2)), torch.rand(8, 32)
        >>> few, many = (recipes.weight_only(bits=bits, group_size=32) for bits in (3, 8))
        >>> quantizer = Quantizer("reference", qconfig=many)
        >>> amp_model = quantizer.amp(model, candidates={"3": few, "8": many})
        >>> _ = amp_model(x)
        >>> found = quantizer.allocate(amp_model, bits_per_weight=4.5)
        >>> {site: choice.candidate for site, choice in found.chosen.items()}
        {'0': '3', '1': '8'}
        """
        return self._allocate(amp_model, bits_per_weight, min_sqnr)

    def optimize(
        self,
        amp_model: AmpModel,
        *,
        candidates: Iterable[str] | Mapping[str, QConfig] | Iterable[QConfig] | None = None,
        min_gain: float = 0.01,
        seed: int = 0,
        progress: bool = True,
    ) -> Optimization:
        """Give each site the treatment that the outputs ask for on this backend, as its override.

        Args:
            amp_model: a proxy of :meth:`amp`; best with data that calibration did not see.
            candidates: ``"smooth"``, another alpha of SmoothQuant, or none; ``"split"``, copies of
                the largest channels; ``"per_token"``, scales chosen at each call; None for these.
                ``"clip"``, codes for a share of the range. Or configurations, as for :meth:`amp`.
            min_gain: the share of all noise that scales per token, which cost time, take off.
            seed: of the random directions.
            progress: show a bar on stderr where it takes more than two seconds.

        Returns:
            What was chosen, predicted and measured; where that is worse, nothing changes.

        Raises:
            NotCalibrated: no data was run through the proxy, or it knows no noise at the outputs.
            InvalidConfig: candidates or a number that are none, or that apply to nothing.

        >>> model, x, quantizer = nn.Sequential(nn.Linear(4, 2)), torch.rand(8, 4), Quantizer()
        >>> _ = quantizer.calib(model)(x), (amp_model := quantizer.amp(model))(x)
        >>> quantizer.optimize(amp_model, candidates=["clip"]).measured[1] > 20
        True
        """
        return self._optimize(amp_model, candidates, min_gain, seed, progress)

    def sensitivity(
        self, amp_model: AmpModel, *, measure: bool | Iterable[int] = False
    ) -> SensitivityReport:
        """Rank the sites by what an AMP proxy has recorded.

        Args:
            amp_model: a proxy that :meth:`amp` made and that data was run through.
            measure: also quantize with so many of the worst groups in float, and measure the output
                SQNR on a few of the samples: True for a choice of counts, or the counts.

        Returns:
            The sensitivities, worst first: print, index, save or plot them.

        Raises:
            NotCalibrated: no data was run through the proxy, or settings, ranges or weights have
                changed since.
            InvalidConfig: it is no AMP proxy of this quantizer.

        >>> model, x, quantizer = nn.Sequential(nn.Linear(4, 2)), torch.rand(8, 4), Quantizer()
        >>> _ = quantizer.calib(model)(x), (amp_model := quantizer.amp(model))(x)
        >>> [site.name for site in quantizer.sensitivity(amp_model)]
        ['0']
        """
        return self._fallback(amp_model).report(measure)

    def fallback(
        self,
        amp_model: AmpModel,
        num: int | None = None,
        *,
        min_sqnr: float | None = None,
        max_slowdown: float | None = None,
        latency: Mapping[str, Latency] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> list[str]:
        """Take the most sensitive sites back to float; calls add up.

        Give one of ``num``, ``min_sqnr`` and ``max_slowdown``. Sites that share a weight, or more
        where the backend needs it, go together and count as one.

        Args:
            amp_model: a proxy that :meth:`amp` made and that data was run through.
            num: how many more.
            min_sqnr: as few as give this output SQNR, dB; checked by quantized runs on a few of the
                samples that the proxy has seen.
            max_slowdown: those that remove the most noise while the quantized model becomes at most
                so much slower (0.05: 5 %), by the time that each site takes.
            latency: those times, from ``amp_model.measure_latency()``; measured now by default.
            dtype: ``torch.float32`` or ``torch.bfloat16``.

        Returns:
            Their names, worst first.

        Raises:
            NotCalibrated: as for :meth:`sensitivity`.
            InvalidConfig: it is no AMP proxy of this quantizer; none or several of the three are
                given; a value out of range.

        >>> model, x, quantizer = nn.Sequential(nn.Linear(4, 2)), torch.rand(8, 4), Quantizer()
        >>> _ = quantizer.calib(model)(x), (amp_model := quantizer.amp(model))(x)
        >>> quantizer.fallback(amp_model, num=1)
        ['0']
        """
        precision = precision_of(dtype)
        names = self._fallback(amp_model, precision).choose(num, min_sqnr, max_slowdown, latency)
        self.fallen_back |= dict.fromkeys(names, precision)
        self.plan = amp_model.session.plan()
        return names

    def reset_fallback(self) -> None:
        """Quantize again what :meth:`fallback`, or ``never_slower``, took back to float.

        >>> quantizer = Quantizer("reference")
        >>> quantizer.reset_fallback(), quantizer.fallen_back
        (None, {})
        """
        self.fallen_back.clear()
        self.slower.clear()
        self.plan = QuantPlan()

    def round_weights(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        folder: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> Rounding:
        """Round weights with data, a block of the model at a time; :meth:`quantize` uses them.

        Each block gets its inputs from the rounded ones before, so that later weights make up for
        what earlier ones lost. Blocks are modules of one class that feed each other, as decoder
        layers do; a model without any is one. Their linear layers are rounded, in the memory of one
        block and of what ``batches`` are between two. Weights that go with calibrated activations
        and a method for blocks (:class:`AdaRound`) are rounded in the model's graph, convolutions
        too; calibrate first. Up to 1 GB of the float model's tensors is kept there.

        Args:
            model: a float32 model; it is not changed.
            batches: some hundred samples in a list or a generator, each as for ``example_inputs``
                of :meth:`calib`: token ids of shape ``[batch, length]``, say.
            folder: keep finished blocks of modules there; a later call with all the same goes on.
            progress: show a bar on stderr where it takes more than two seconds.

        Returns:
            What was done to each block; ``print`` shows a table.

        Raises:
            InvalidConfig: there are no batches, or nothing to round; ``folder`` is of other
                settings, data or weights.
            QuantError: a weight cannot be rounded; names the block.

        >>> from torch_quant import recipes
        >>> model, x = nn.Sequential(nn.Linear(32, 8)), torch.ones(4, 32)
        >>> quantizer = Quantizer("reference", qconfig=recipes.int4_weight_only(group_size=32))
        >>> quantizer.round_weights(model, [x]).sites
        ('0',)
        >>> quantizer.quantize(model)(x).shape
        torch.Size([4, 8])
        """
        return self._round(model, batches, folder, progress)

    def quantize(
        self,
        model: nn.Module,
        *,
        backend: Backend | str | None = None,
        example_inputs: Any = None,
        share_float_weights: bool = False,
        never_slower: bool | Measure = False,
        seconds: float = 20.0,
        progress: bool = True,
    ) -> QuantizedModule:
        """The quantized model, on real kernels: call it, trace it, export it, copy it, save it.

        It is a snapshot: what is done to ``model`` later does not reach it.

        Args:
            model: the model that was calibrated, with its current weights; or what ``qat`` made.
            backend: another backend than the quantizer's; needs no second calibration.
                ``"fastest"`` takes the one that :meth:`profile` finds on this machine, and leaves
                its table in ``quantizer.measured``.
            example_inputs: as for :meth:`calib`, for a quantizer whose ranges were loaded, to
                have a backend that compiles do so now, not at the first call, or to measure with.
            share_float_weights: save memory: large weights that stay in float are ``model``'s own.
                Once an operator has changed one of them in place, as ``model.load_state_dict``
                does, the quantized model refuses calls; changes through ``weight.data`` are not
                noticed.
            never_slower: measure with ``example_inputs`` which parts of the model take longer
                quantized than in float, by more than chance, and take them back to float; those
                that an override names stay. What was found is in ``quantizer.slower``, for this
                backend, and holds until :meth:`reset_fallback`; the table is in
                ``quantizer.regions``. Instead of True, a function that measures, as on another
                machine: it gets models by name and gives the milliseconds of calls of each, made
                in turns.
            seconds: about how long to measure for that, without what quantizing takes; at least 11
                calls are made for each part.
            progress: whether to show a progress bar while measuring.

        Raises:
            NotCalibrated: no data was seen, or the model has changed since.
            UnsupportedOp: nothing in the model can be quantized.
            InvalidConfig: there is nothing to measure with.

        >>> model, x, quantizer = nn.Linear(4, 2), torch.ones(8, 4), Quantizer("reference")
        >>> _ = quantizer.calib(model)(x)
        >>> quantizer.quantize(model)(x).shape
        torch.Size([8, 2])
        """
        if never_slower is not False:
            backend = self._without_slower(
                model, backend, example_inputs, never_slower, seconds, progress
            )
        return self._quantized(model, backend, example_inputs, share_float_weights)
