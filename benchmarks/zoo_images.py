"""Models of timm and torchvision: of each family the smallest, with random weights.

A family is a module of the library. Its members are made without values first, to find the one
with the fewest parameters. Each gets images of the size that it is made for, and norms get the
statistics of such images, since what starts at mean 0 and deviation 1 fits no activation.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["families", "settled", "smallest", "torchvision_candidates"]

SMALL = 10_000_000
"""Parameters; of what is larger a member with two layers is made, if its builder takes a depth."""

ONLY_PARTLY_PYTORCH = ("quantization",)
"""Folders of torchvision with models that are quantized already, and have float twins beside."""

FEWER = ({"depth": 2}, {"depths": (1, 1, 1, 1)}, {})

DETECTORS: tuple[dict[str, Any], ...] = (
    {"min_size": 96, "max_size": 160, "box_score_thresh": 0.0},
    {"min_size": 96, "max_size": 160, "score_thresh": 0.0},
    {"score_thresh": 0.0},
    {},
)
"""Random weights are sure of nothing, so a threshold would leave no detection."""


def families(library: str) -> dict[str, str]:
    """``library/family`` -> the module with its builders."""
    if library == "timm":
        return {f"timm/{each}": each for each in importlib.import_module("timm").list_modules()}
    models = importlib.import_module("torchvision").models
    root = f"{models.__name__}."
    modules = {models.get_model_builder(each).__module__ for each in models.list_models()}
    names = sorted(each.removeprefix(root) for each in modules)
    return {
        f"torchvision/{each}": each
        for each in names
        if each.partition(".")[0] not in ONLY_PARTLY_PYTORCH
    }


def smallest(library: str, family: str) -> tuple[nn.Module, str]:
    """The member of a family with the fewest parameters, eval mode, and its name."""
    make, members = _members(library, family)
    sizes: list[tuple[int, str]] = []
    reason: Exception | None = None
    for name in members:
        try:
            with torch.device("meta"):
                sizes.append((_count(make(name)), name))
        except Exception as e:  # a builder that needs values, or a package that is not there
            reason = e
    if not sizes:
        raise reason or LookupError(f"{family} has no models")
    count, name = min(sizes)
    for changes in FEWER if count > SMALL else ({},):
        try:
            return make(name, **changes).eval(), name
        except (TypeError, ValueError, AssertionError, IndexError) as e:
            reason = e
    raise reason or LookupError(name)


def _members(library: str, family: str) -> tuple[Callable[..., nn.Module], list[str]]:
    if library == "timm":
        timm = importlib.import_module("timm")
        return timm.create_model, timm.list_models(module=family)
    models = importlib.import_module("torchvision").models
    path = f"{models.__name__}.{family}"
    names = [x for x in models.list_models() if models.get_model_builder(x).__module__ == path]
    options = DETECTORS if family.startswith("detection.") else ({},)

    def make(name: str, **changes: Any) -> nn.Module:
        takes = inspect.signature(models.get_model_builder(name)).parameters
        given = {"weights": None} | (
            {"weights_backbone": None} if "weights_backbone" in takes else {}
        )
        for each in options[:-1]:
            try:
                return models.get_model(name, **given, **each, **changes)
            except TypeError:
                continue
        return models.get_model(name, **given, **changes)

    return make, names


def _count(model: nn.Module) -> int:
    return sum(x.numel() for x in model.parameters())


def image_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width that a model of timm is made for."""
    made_for = getattr(model, "default_cfg", None) or {}
    channels, height, width = made_for.get("input_size", (3, 224, 224))
    return channels, height, width


def timm_candidates(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Inputs of two batch sizes."""
    (argument,) = list(inspect.signature(model.forward).parameters)[:1]
    yield [{argument: torch.randn(b, *image_size(model))} for b in (2, 3)]


def torchvision_candidates(model: nn.Module, family: str) -> Iterator[list[dict[str, Any]]]:
    """Inputs of two batch sizes: images, lists of images, pairs of images, or clips."""
    takes = list(inspect.signature(model.forward).parameters)
    kind = family.partition(".")[0]
    if kind == "detection":
        sizes = [[(3, 96, 128), (3, 96, 96)], [(3, 128, 96), (3, 96, 128), (3, 96, 96)]]
        yield [{takes[0]: [torch.rand(x) for x in each]} for each in sizes]
    elif kind == "optical_flow":
        yield [{x: torch.randn(b, 3, 128, 136) for x in takes[:2]} for b in (2, 3)]
    elif kind == "video":
        for frames, side in ((4, 64), (16, 64), (16, 112), (16, 224)):
            yield [{takes[0]: torch.randn(b, 3, frames, side, side)} for b in (2, 3)]
    else:
        sides = (96, 224, 299) if kind == "segmentation" else (224, 299)
        for side in sides:
            yield [{takes[0]: torch.randn(b, 3, side, side)} for b in (2, 3)]


def settled(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Make batch norms give what reaches them with these inputs at a size of 1.

    Means stay 0, and all channels of a norm have one variance: few images of noise are alike far
    inside of a model, and to take their mean away, or to enlarge channels that hardly vary, would
    leave noise alone. ConvMixer's outputs in float32 were 6 dB from those in float64 then.
    """

    def rescale(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        (x,) = arguments
        norm.get_buffer("running_var").fill_(x.square().mean().clamp_min(1e-30))

    norms = [x for x in model.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)]
    hooks = [x.register_forward_pre_hook(rescale) for x in norms if x.running_var is not None]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
