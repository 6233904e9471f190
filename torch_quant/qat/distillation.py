"""The float model as the teacher of the model that is quantized.

Distances between results of layers are those of Romero et al. 2015, "FitNets: Hints for Thin Deep
Nets"; between logits, of Hinton et al. 2015, "Distilling the Knowledge in a Neural Network". Both
need no labels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant.errors import InvalidConfig
from torch_quant.qat.model import QatModel, switches_of
from torch_quant.qat.modes import TrainedGraph
from torch_quant.qat.schedule import follow

__all__ = ["Distillation"]


def _floats(outputs: Any) -> list[Tensor]:
    values = outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs
    leaves = pytree.tree_leaves(values)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Squared error in units of what the teacher has: 1 if ours is 0."""
    return (ours - theirs).square().mean() / theirs.square().mean().clamp(min=1e-12)


class Distillation:
    """Losses of a QAT model against the float model as it is when this is made.

    Args:
        qat_model: what ``quantizer.qat`` made. Its teacher is a copy that rounds nothing and stays,
            so memory is that of both.
        hidden: modules whose results are compared, by their paths in the model.
        temperature: compare float outputs as logits of classes, ``T^2 KL(teacher || student)`` over
            the last dimension, at this temperature; None for their squared error, in units of the
            teacher's square.
        hidden_weight: the share of the mean distance of hidden results in the loss.

    Raises:
        InvalidConfig: it is no QAT model; a module is none that is captured as a part of a graph.

    >>> from torch_quant import Quantizer
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x, quantizer = torch.rand(8, 4), Quantizer("reference")
    >>> _ = quantizer.calib(model)(x)
    >>> distillation = Distillation(quantizer.qat(model), hidden=["1"])
    >>> loss = distillation.loss(x)
    >>> loss.backward()
    >>> sorted(distillation.distances)
    ['1', 'outputs']
    """

    def __init__(
        self,
        qat_model: nn.Module,
        *,
        hidden: Sequence[str] = (),
        temperature: float | None = None,
        hidden_weight: float = 1.0,
    ) -> None:
        self._ours = switches_of(qat_model)
        assert isinstance(qat_model, QatModel)
        if temperature is not None and not temperature > 0.0:
            raise InvalidConfig(f"temperature={temperature!r}; expected more than 0, or None")
        known = {
            path
            for module in qat_model.modules()
            if isinstance(module, QatModel)
            for graph in module.quantization.graphs
            if isinstance(graph, TrainedGraph)
            for path in graph.results
        }
        if lacking := [path for path in hidden if path not in known]:
            raise InvalidConfig(
                f"hidden={lacking!r}: no module of a graph is called so; expected some of "
                f"{', '.join(sorted(known)[:8])}, ..."
            )
        self.qat_model, self.hidden = qat_model, tuple(hidden)
        self.temperature, self.hidden_weight = temperature, hidden_weight
        self.teacher = copy.deepcopy(qat_model).eval().requires_grad_(False)
        self._theirs = switches_of(self.teacher)
        self._theirs.never_rounds = True
        follow(self.teacher)
        self.distances: dict[str, float] = {}
        """Of the last call: squared error in units of the teacher's square."""

    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run both on one batch; a scalar to be minimized.

        >>> from torch_quant import Quantizer
        >>> model, x, quantizer = nn.Linear(4, 2), torch.rand(8, 4), Quantizer("reference")
        >>> _ = quantizer.calib(model)(x)
        >>> float(Distillation(quantizer.qat(model)).loss(x).detach()) < 0.01
        True
        """
        for switches in (self._ours, self._theirs):
            switches.taps = self.hidden
            switches.tapped.clear()
        try:
            follow(self.qat_model)
            follow(self.teacher)
            with torch.no_grad():
                expected = _floats(self.teacher(*args, **kwargs))
            outputs = _floats(self.qat_model(*args, **kwargs))
        finally:
            self._ours.taps = ()
            follow(self.qat_model)
        pairs = list(zip(outputs, expected, strict=True))
        errors = [_distance(one, two) for one, two in pairs]
        if self.temperature is None:
            loss = torch.stack(errors).mean()
        else:
            loss = torch.stack([self._divergence(one, two) for one, two in pairs]).mean()
        ours, theirs = self._ours.tapped, self._theirs.tapped
        apart = {name: _distance(ours[name], theirs[name]) for name in self.hidden if name in ours}
        if apart:
            loss = loss + self.hidden_weight * torch.stack(list(apart.values())).mean()
        apart["outputs"] = torch.stack(errors).mean()
        self.distances = {name: float(x.detach()) for name, x in apart.items()}
        ours.clear()
        theirs.clear()
        return loss

    def _divergence(self, ours: Tensor, theirs: Tensor) -> Tensor:
        assert self.temperature is not None
        one, two = ((x / self.temperature).log_softmax(-1) for x in (ours, theirs))
        found = F.kl_div(one, two, reduction="none", log_target=True).sum(-1).mean()
        return found * self.temperature**2
