"""What an entry of the zoo is, how its model is made from a config, and inputs by modality."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from models import images, normal, randomize_batch_norms, scale_weights, tokens
from torch import Tensor, nn

__all__ = [
    "OTHER_LENGTH",
    "Inputs",
    "ZooEntry",
    "entry",
    "padding",
    "pixels",
    "text",
    "text_to_text",
    "wave",
]

Inputs = Callable[[int], dict[str, Any]]

VOCAB = 128
LENGTH = 16
OTHER_LENGTH = 11


@dataclass(frozen=True)
class ZooEntry:
    """An architecture at toy size: ``build()(**inputs(batch))`` runs it.

    Every ``build()`` gives the same weights, in eval mode; every ``inputs(batch)`` the same data,
    other data for another batch size. ``other(batch)`` has another length or image size, which not
    every architecture takes.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    other: Inputs
    family: str
    note: str = ""


def entry(
    name: str,
    model: str,
    config: Mapping[str, Any],
    inputs: Inputs,
    other: Inputs,
    family: str,
    *,
    gain: float = 0.8,
    shift: float = 0.0,
    note: str = "",
) -> ZooEntry:
    """An entry for the ``transformers`` class called ``model``, with ``config`` over its defaults.

    ``gain`` is the factor by which a linear or convolution changes the standard deviation of a
    signal: about 0.6 in BERT as published, 1.4 in a ReLU network that keeps it. ``shift`` goes to
    the biases of the batch norms, towards the linear part of the rectifiers that follow: dozens of
    random layers that cut half of their inputs amplify any noise, as no trained network does.
    """
    build = partial(_build, model, config, inputs, gain, shift)
    return ZooEntry(name, build, inputs, other, family, note)


def _build(
    name: str, config: Mapping[str, Any], inputs: Inputs, gain: float, shift: float
) -> nn.Module:
    import transformers

    cls = getattr(transformers, name)
    options = deepcopy(dict(config))  # some models write into their config's lists
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = cls(cls.config_class(**options)).eval()
        scale_weights(model, gain=gain)
        randomize_batch_norms(model)
        _perturb_constants(model)
        _fit_batch_norms(model, inputs(8), shift)
    return model


def _perturb_constants(model: nn.Module) -> None:
    """Add noise to parameters that start as one number: biases of 0, norms of 1.

    As they are, a pass that loses them would go unseen.
    """
    for parameter in model.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.randn_like(parameter) * 0.1)


def _fit_batch_norms(model: nn.Module, batch: dict[str, Any], shift: float) -> None:
    """Set each batch norm to the means and the mean variance in ``batch``, off by up to a half.

    With arbitrary statistics the signal of a deep network fades or grows without bound.
    """

    def fit(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        (x,) = args
        var, mean = torch.var_mean(x, [dim for dim in range(x.dim()) if dim != 1], correction=0)
        norm.running_mean.copy_(mean + 0.1 * var.sqrt() * torch.randn_like(mean))
        norm.running_var.copy_(var.mean() * (0.5 + torch.rand_like(var)))
        if norm.affine:
            norm.bias.add_(shift)

    kind = nn.modules.batchnorm._BatchNorm
    hooks = [m.register_forward_pre_hook(fit) for m in model.modules() if isinstance(m, kind)]
    if hooks:
        model(**batch)
    for hook in hooks:
        hook.remove()


def padding(batch: int, length: int = LENGTH) -> Tensor:
    """An attention mask, 1 then 0: the rows keep 13/16, 10/16 and all of their tokens, in turn."""
    kept = length - 3 * ((torch.arange(batch) + 1) % 3)
    return (torch.arange(length) < kept[:, None]).long()


def text(batch: int, length: int = LENGTH) -> dict[str, Any]:
    """Token ids from 3 up, 0 where padded, and the mask."""
    mask = padding(batch, length)
    return {"input_ids": tokens(batch, length, VOCAB, low=3) * mask, "attention_mask": mask}


def text_to_text(batch: int, length: int = LENGTH) -> dict[str, Any]:
    """``text``, and the first half of another text for the decoder."""
    ids = tokens(batch, length // 2, VOCAB, low=3)
    return {**text(batch, length), "decoder_input_ids": ids}


def pixels(size: int) -> Inputs:
    """Pictures of ``size`` by ``size``, mean 0 and unit variance."""
    return lambda batch: {"pixel_values": images(batch, size)}


def wave(samples: int) -> Inputs:
    """A few tones in noise, unit variance, ``(batch, samples)``."""

    def inputs(batch: int) -> dict[str, Any]:
        times = torch.arange(samples) / 16000
        pitches = 200 + 150 * normal(batch, 3, 1).abs()
        tones = torch.sin(2 * torch.pi * pitches * times).sum(1) / 3
        return {"input_values": tones + 0.7 * normal(batch, samples, salt=1)}

    return inputs
