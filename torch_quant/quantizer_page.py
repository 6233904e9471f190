"""The report of a quantizer as one page."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from torch_quant.amp.proxy import AmpModel
from torch_quant.amp.ranking import Ranking
from torch_quant.backends import Backend, usable_backend
from torch_quant.comparing import listed
from torch_quant.errors import InvalidConfig
from torch_quant.graph.running import frozen
from torch_quant.quantizer_reports import QuantizerReports, comparing_bar
from torch_quant.report.speed import Profile
from torch_quant.report.whole import ModelReport, checked_report
from torch_quant.reporting.gathering import Extras, checked_metrics, gathered

__all__ = ["QuantizerPage"]


class QuantizerPage(QuantizerReports):
    """The public method of a :class:`Quantizer` that puts all reports into one."""

    def report(
        self,
        path: str | os.PathLike[str] | None = None,
        model: nn.Module | None = None,
        batches: Iterable[Any] = (),
        *,
        sensitivity: AmpModel | Ranking | None = None,
        profile: Profile | None = None,
        metrics: Mapping[str, tuple[float, float]] | None = None,
        title: str = "",
        backend: Backend | str | None = None,
        progress: bool = True,
    ) -> ModelReport:
        """Everything that is known of a quantized model, as one HTML page to look at.

        The model is quantized twice for that, on its backend and in float arithmetic.

        Args:
            path: where to write the page, ``report.html``, or its data, ``report.json``; None to
                only return it.
            model: the model that was calibrated; the one that this quantizer knows by default.
            batches: inputs, each as for :meth:`calib`: the error is followed on them from layer to
                layer, and the values of activations are counted.
            sensitivity: a proxy of :meth:`amp` that data was run through, or what
                :meth:`sensitivity` gave.
            profile: what :meth:`profile` gave.
            metrics: a metric of yours -> its value for the float model and the quantized one;
                numbers, of NumPy or as tensors too, which may be infinite or NaN.
            title: the headline.
            backend: another backend than the quantizer's.
            progress: show a bar on stderr.

        Returns:
            The report; ``print`` shows its headline, ``report.plot_layer(name)`` and others draw
            its figures in a notebook.

        Raises:
            NotCalibrated: no data was seen, or the model has changed since.
            InvalidConfig: ``path`` cannot be written; not one model is known; ``metrics`` or
                ``batches`` are none.

        >>> import torch
        >>> from torch_quant import Quantizer
        >>> model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), torch.rand(16, 8)
        >>> quantizer = Quantizer("reference")
        >>> _ = quantizer.calib(model)(x)
        >>> report = quantizer.report(model=model, batches=[x])
        >>> [layer["format"] for layer in report.data["layers"]]
        ['int8', 'int8']
        """
        if isinstance(path, nn.Module):
            raise InvalidConfig(
                f"report({type(path).__name__}): the file comes first, and then the model: "
                'quantizer.report("report.html", model)'
            )
        if path is not None:
            checked_report(path)
        if profile is not None and not isinstance(profile, Profile):
            raise InvalidConfig(
                f"profile is of type {type(profile).__name__}; expected what "
                "quantizer.profile(model, example_inputs) returns"
            )
        checked = checked_metrics(metrics)
        model = self._only(model, "report")
        kept = listed(batches, "report")
        chosen = self.backend if backend is None else usable_backend(backend)
        ranking = self._ranking(sensitivity)
        if not kept:
            self._ready(model, chosen, None, "report")
        with frozen(model):
            example = copy.deepcopy(kept[0]) if kept else None
            quantized = super()._quantized(model, chosen, example, False)
            settings = self._settings_data()
            extras = Extras(
                kept, ranking, profile, checked, title, settings, comparing_bar(progress)
            )
            with self.state.lock:
                found = gathered(self._session(model, chosen), chosen, quantized, extras)
        if path is not None:
            found.save(path)
        return found

    def _ranking(self, given: AmpModel | Ranking | None) -> Ranking | None:
        if given is None or isinstance(given, Ranking):
            return given
        return self._fallback(given).report(False)

    def _settings_data(self) -> Mapping[str, Any] | str:
        """The configuration as data, or why it has no form as such."""
        try:
            return self._to_config(None)
        except InvalidConfig as error:
            return str(error)
