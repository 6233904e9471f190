"""What a quantizer does to train a model: the QAT model, its optimizer's groups, deployment."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from torch_quant.amp.allocation import exactly
from torch_quant.backends import Backend, usable_backend
from torch_quant.convert.quantized import QuantizedModule
from torch_quant.errors import InvalidConfig
from torch_quant.qat.edges import edge_configs
from torch_quant.qat.making import (
    Deployed,
    qat_lowering,
    qat_plan,
    start_training,
    their_tensors,
    trainable,
)
from torch_quant.qat.methods import QatMethod, qat_method
from torch_quant.qat.model import QatModel, bond_of, scale_names
from torch_quant.quantizer_files import QuantizerFiles

__all__ = ["QuantizerTraining"]


def _power_of_two(scale: nn.Parameter) -> float:
    """The one next to the mean size of a scale, or of a zero point; 1 for 0 and for no number."""
    mean = float(scale.detach().abs().mean())
    return 2.0 ** round(math.log2(mean)) if 0.0 < mean < math.inf else 1.0


class QuantizerTraining(QuantizerFiles):
    """The public methods of a :class:`Quantizer` that train."""

    def qat(
        self,
        model: nn.Module,
        method: str = "lsq",
        *,
        edge_bits: int | None = 8,
        example_inputs: Any = None,
    ) -> QatModel:
        """A twin that computes what :meth:`quantize` would deploy, and trains ``model`` through it.

        Train it as any module, then give it to :meth:`quantize`. Its parameters are ``model``'s own
        and, where the method learns them, the scales, which begin as calibrated. See
        :class:`QatModel` for train mode, and :class:`QatSchedule` for what changes on the way.

        Args:
            model: the model that was calibrated; its parameters are what is trained.
            method: ``"lsq"`` learns the scales of weights and activations, ``"lsq_plus"`` zero
                points of activations too, ``"pact"`` where activations are clipped, ``"fixed"``
                none; or the name of a registered one.
            edge_bits: of the first and last layers, where these would have fewer and others do.
                They become overrides of this quantizer, so :meth:`quantize`, :meth:`explain` and
                :meth:`to_config` follow; a layer that has an override keeps it. None leaves them.
            example_inputs: as for :meth:`calib`, for a quantizer whose ranges were loaded.

        Where weights are rounded by data (GPTQ), training begins with the codes of that: a constant
        is added to each weight, so that nearest rounding gives them.

        SmoothQuant's factors are those of the weights that training begins with, and stay; the
        weights behind them are trained. An optional bias correction is left out: biases learn.

        Raises:
            NotCalibrated: ranges are needed, and no data was seen; or the model has changed since.
            InvalidConfig: an unknown method; every parameter is frozen; the QConfig has float zero
                points or requires transforms that would have to follow the weights, or the weights
                were rounded by :meth:`round_weights`.
            UnsupportedOp: nothing in the model can be quantized.

        >>> import torch
        >>> from torch_quant import Quantizer, recipes
        >>> quantizer = Quantizer(recipes.fast(), backend="reference")
        >>> model, x = nn.Linear(4, 2), torch.ones(8, 4)
        >>> _ = quantizer.calib(model)(x)
        >>> qat_model = quantizer.qat(model)
        >>> sorted(name for name, _ in qat_model.named_parameters())
        ['bias', 'linear.input_scale', 'weight', 'weight_scale']
        >>> qat_model(x).sum().backward()
        >>> torch.equal(quantizer.quantize(qat_model)(x), qat_model(x))
        True
        """
        chosen = qat_method(method)
        with self.state.lock:  # another thread may calibrate
            return self._qat(model, chosen, example_inputs, edge_bits)

    def _qat(
        self, model: nn.Module, chosen: QatMethod, example_inputs: Any, edge_bits: int | None
    ) -> QatModel:
        backend, session = self._ready(model, None, example_inputs, "qat")
        session.tell_observers()
        if edge_bits is not None:
            edges = edge_configs(session, session.plan(backend), edge_bits)
            self.overrides = {**self.overrides, **{exactly(x): each for x, each in edges.items()}}
        required, planned = session.plans(backend)
        plan = qat_plan(trainable(planned, required))
        for site in plan.values():
            if site.quantized and site.weight is not None and site.weight.float_zero_points:
                raise InvalidConfig(
                    f"{site.name}: qat() trains zero points that are codes, not {site.weight}: use "
                    "a QuantSpec with float_zero_points=False"
                )
        lowering = qat_lowering(session, backend, plan, chosen)
        made = self._lowered(session, lowering, False)
        assert isinstance(made, QatModel)
        start_training(session, lowering, made, backend, self.unseen_calls == "capture")
        return made

    def parameter_groups(
        self, qat_model: QatModel, *, lr: float, scale_lr: float, relative: bool = False
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer: the model's own parameters, and the scales without weight decay.

        Args:
            qat_model: what :meth:`qat` made.
            lr: learning rate of weights and biases.
            scale_lr: that of scales and zero points. Adam moves each by about this much in a step,
                so it should be some hundredths of the scales, which are 1e-3 to 1e-1 at most sites.
            relative: ``scale_lr`` is in units of what a scale is now, so that Adam moves each by
                this share of itself. Scales are in a group for each power of two then, so call this
                before a checkpoint is loaded, as when the run began.

        Raises:
            InvalidConfig: it is no QAT model, or every parameter of it is frozen.

        >>> import torch
        >>> from torch_quant import Quantizer
        >>> model, x, quantizer = nn.Linear(4, 2), torch.ones(8, 4), Quantizer("reference")
        >>> _ = quantizer.calib(model)(x)
        >>> groups = quantizer.parameter_groups(quantizer.qat(model), lr=1e-2, scale_lr=1e-4)
        >>> [len(group["params"]) for group in groups]
        [2, 2]
        >>> optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        """
        if not isinstance(qat_model, QatModel):
            raise InvalidConfig(
                f"expected what quantizer.qat(model) makes, got {type(qat_model).__name__}"
            )
        names = set(scale_names(qat_model))
        found: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
        for name, parameter in qat_model.named_parameters():
            if parameter.requires_grad:
                found[name in names].append(parameter)
        if not any(found):
            raise InvalidConfig("every parameter of the QAT model is frozen: nothing to train")
        groups: list[dict[str, Any]] = [{"params": found[0], "lr": lr}]
        by_size: dict[float, list[nn.Parameter]] = {}
        for scale in found[1]:
            by_size.setdefault(_power_of_two(scale) if relative else 1.0, []).append(scale)
        for size, scales_of_size in sorted(by_size.items()):
            # They are many and tiny, so calls are what takes the time; "foreach" makes fewer.
            how = {"lr": scale_lr * size, "weight_decay": 0.0, "foreach": True}
            groups.append({"params": scales_of_size, **how})
        return [group for group in groups if group["params"]]

    def _quantized(
        self,
        model: nn.Module,
        backend: Backend | str | None,
        example_inputs: Any,
        share_float_weights: bool,
    ) -> QuantizedModule:
        if not isinstance(model, QatModel):
            return super()._quantized(model, backend, example_inputs, share_float_weights)
        if share_float_weights:
            raise InvalidConfig("a trained model is deployed with weights of its own")
        session = bond_of(model).session
        if session.owner is not self:
            raise InvalidConfig("the QAT model is of another quantizer: use the one that made it")
        chosen = self.backend if backend is None else usable_backend(backend)
        deployed = Deployed.of(model)
        with their_tensors(session.model, model):
            quantized = self._lowered(session, deployed.lowering(session, chosen), False)
            if self.unseen_calls == "capture":
                deployed.attend(session, chosen, quantized)
        return self._described(quantized, chosen)
