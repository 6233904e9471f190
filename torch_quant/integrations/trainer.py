"""transformers' ``Trainer``: quantize its model in one line, or train it through the quantization.

Nothing here is imported unless you do: ``from torch_quant.integrations.trainer import ...``. The
``Trainer`` itself needs the package ``accelerate``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from torch_quant.convert.quantized import QuantizedModule
from torch_quant.errors import InvalidConfig
from torch_quant.qat.model import QatModel, scale_names
from torch_quant.qat.schedule import QatSchedule
from torch_quant.quantizer import Quantizer
from torch_quant.tuning import tune

__all__ = ["QuantizationCallback", "calibrate_trainer", "quantize_trainer"]

_APPROACHES = ("post_training", "qat")


def _batches(trainer: Trainer, count: int) -> Iterator[dict[str, Any]]:
    """The first batches of the data set for training, in order, without labels."""
    if trainer.train_dataset is None:
        raise InvalidConfig("the Trainer has no train_dataset to calibrate with")
    labels = set(trainer.label_names or ()) | {"labels"}
    loader = trainer.get_eval_dataloader(trainer.train_dataset)
    for batch in itertools.islice(loader, count):
        prepared = trainer._prepare_inputs(batch)
        yield {name: x for name, x in prepared.items() if name not in labels}


def _model_of(trainer: Trainer) -> nn.Module:
    """The Trainer's model; raises :class:`InvalidConfig` where there is none yet."""
    if trainer.model is None:
        raise InvalidConfig("the Trainer has no model; give it one, Trainer(model=...)")
    return trainer.model


def _put(trainer: Trainer, model: nn.Module) -> None:
    """Have a Trainer use another model."""
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model
    trainer.accelerator._models.clear()


def calibrate_trainer(trainer: Trainer, quantizer: Quantizer, batches: int = 32) -> None:
    """Run the first batches of a Trainer's data through its model, to record ranges.

    Args:
        trainer: has the float model and a ``train_dataset``; labels are left out.
        quantizer: gets the ranges.
        batches: how many, of the size for evaluation.

    Raises:
        InvalidConfig: there is no data set, or ``batches`` is not positive.
    """
    if batches < 1:
        raise InvalidConfig(f"batches={batches}; expected 1 or more")
    model = _model_of(trainer)
    calib_model = quantizer.calib(model)
    training = model.training
    with torch.no_grad():
        for batch in _batches(trainer, batches):
            calib_model(**batch)
    model.train(training)


class QuantizationCallback(TrainerCallback):
    """Trains a Trainer's model through its quantization.

    :meth:`attach` calibrates, and gives the Trainer the QAT model. At the end of training,
    ``callback.quantized`` is the quantized model. A checkpoint is resumed by a Trainer that a new
    callback was attached to, with the same model and data.

    Args:
        quantizer: says what is quantized and how.
        method: as for :meth:`Quantizer.qat`.
        edge_bits: as for :meth:`Quantizer.qat`.
        batches: how many to calibrate with; 0 if the quantizer has seen data.
        scale_lr: learning rate of scales; that of weights is the Trainer's. A Trainer that was
            given an optimizer keeps that, which has to know the scales.
        observe_until: as for :class:`QatSchedule`.
        freeze_bn_at: as for :class:`QatSchedule`.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        *,
        method: str = "lsq",
        edge_bits: int | None = 8,
        batches: int = 32,
        scale_lr: float = 1e-4,
        observe_until: int = 0,
        freeze_bn_at: int | None = None,
    ) -> None:
        self.quantizer, self.method, self.edge_bits = quantizer, method, edge_bits
        self.batches, self.scale_lr = batches, scale_lr
        self.observe_until, self.freeze_bn_at = observe_until, freeze_bn_at
        self.quantized: QuantizedModule | None = None
        self._qat_model: QatModel | None = None
        self._schedule: QatSchedule | None = None

    def attach(self, trainer: Trainer) -> QuantizationCallback:
        """Have ``trainer`` train the QAT model of its model; call it once, before ``train``."""
        if isinstance(trainer.model, QatModel):
            raise InvalidConfig("the Trainer's model is a QAT model already")
        if self.batches:
            calibrate_trainer(trainer, self.quantizer, self.batches)
        model = self.quantizer.qat(_model_of(trainer), self.method, edge_bits=self.edge_bits)
        self._qat_model = model
        _put(trainer, model)
        if trainer.optimizer is None:
            trainer.optimizer = self._optimizer(trainer, model)
        trainer.add_callback(self)
        return self

    def _optimizer(self, trainer: Trainer, model: QatModel) -> torch.optim.Optimizer:
        """The Trainer's kind of optimizer, with scales in a group of their own."""
        cls, options = Trainer.get_optimizer_cls_and_kwargs(trainer.args, cast(Any, model))
        decayed, scales = set(trainer.get_decay_parameter_names(model)), set(scale_names(model))
        groups: dict[str, dict[str, Any]] = {
            "decayed": {"params": [], "weight_decay": trainer.args.weight_decay},
            "plain": {"params": [], "weight_decay": 0.0},
            "scales": {"params": [], "weight_decay": 0.0, "lr": self.scale_lr},
        }
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                kind = "decayed" if name in decayed else "plain"
                groups["scales" if name in scales else kind]["params"].append(parameter)
        made: torch.optim.Optimizer = cls(
            [group for group in groups.values() if group["params"]], **options
        )
        return made

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the schedule, where the model's count of steps is."""
        if self._qat_model is None:
            raise InvalidConfig("QuantizationCallback: callback.attach(trainer) comes before train")
        self._schedule = QatSchedule(
            self._qat_model, observe_until=self.observe_until, freeze_bn_at=self.freeze_bn_at
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One step of the schedule."""
        assert self._schedule is not None
        self._schedule.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Quantize what was trained."""
        assert self._qat_model is not None
        self.quantized = self.quantizer.quantize(self._qat_model)


def quantize_trainer(
    trainer: Trainer,
    quantizer: Quantizer | None = None,
    *,
    approach: str = "post_training",
    batches: int = 32,
    metric: str | None = None,
    tolerance: float = 0.01,
    higher_is_better: bool = True,
    max_trials: int | None = None,
    timeout: float | None = None,
    callback: QuantizationCallback | None = None,
) -> QuantizedModule:
    """Quantize a Trainer's model in one line.

    The Trainer has its float model again afterwards, with weights that were trained under
    ``"qat"``.

    Args:
        trainer: has a model and a ``train_dataset``; with ``metric``, an ``eval_dataset`` too.
        quantizer: what is quantized and how: static int8 by default;
            ``Quantizer(recipes.int8_dynamic())`` needs no ranges.
        approach: ``"post_training"``, or ``"qat"``, which calls ``trainer.train()``.
        batches: how many to calibrate with.
        metric: a number that ``trainer.evaluate()`` gives, ``"accuracy"`` or ``"eval_accuracy"``:
            as few layers stay in float as keep it within ``tolerance``, see :func:`tune`.
        tolerance: how much of the float model's metric may be lost: 0.01 is 1 %.
        higher_is_better: False for a loss.
        max_trials: most evaluations.
        timeout: seconds after which no further trial is begun.
        callback: for ``"qat"``, in the place of ``QuantizationCallback(quantizer)``.

    Raises:
        InvalidConfig: an unknown approach; a metric that the Trainer does not give; no data.
    """
    if approach not in _APPROACHES:
        raise InvalidConfig(
            f"approach={approach!r}; expected {' or '.join(map(repr, _APPROACHES))}"
        )
    quantizer = quantizer or (callback.quantizer if callback else Quantizer())
    model = _model_of(trainer)
    training = model.training
    try:
        if approach == "qat":
            callback = callback or QuantizationCallback(quantizer, batches=batches)
            callback.attach(trainer)
            trainer.train()
            trainer.remove_callback(callback)
            assert callback.quantized is not None
            trained = _model_of(trainer)
            if metric is None:
                return callback.quantized
        else:
            trained = model
            calibrate_trainer(trainer, quantizer, batches)
            if metric is None:
                return quantizer.quantize(model)

        def evaluated(candidate: nn.Module) -> float:
            _put(trainer, candidate)
            found = trainer.evaluate()
            name = metric if metric in found else f"eval_{metric}"
            if name not in found:
                raise InvalidConfig(
                    f"metric={metric!r}; trainer.evaluate() gives {', '.join(sorted(found))}"
                )
            return float(found[name])

        return tune(
            quantizer,
            trained,
            evaluated,
            tolerance,
            higher_is_better=higher_is_better,
            max_trials=max_trials,
            timeout=timeout,
            progress=not trainer.args.disable_tqdm,
        )
    finally:
        _put(trainer, model)
        model.train(training)
