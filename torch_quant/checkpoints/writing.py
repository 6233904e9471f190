"""Write a quantized language model as a folder that transformers, vLLM and others load."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torch_quant.checkpoints.files import CONFIG, WEIGHTS
from torch_quant.checkpoints.layout import Layout
from torch_quant.checkpoints.skeletons import config_of, tensors_of, tied_names
from torch_quant.checkpoints.stored import LAYOUTS
from torch_quant.convert.codes import QuantizedWeight, quantized_weights
from torch_quant.convert.quantized import QuantizedModule
from torch_quant.core.naming import did_you_mean
from torch_quant.errors import InvalidConfig
from torch_quant.io.files import checked_target_folder, save_tensors, staging
from torch_quant.nn.stand_in import class_of

__all__ = ["check_held", "checked_layout", "describe", "export_checkpoint"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

logger = logging.getLogger("torch_quant")


class Tokenizer(Protocol):
    """Whatever saves itself into a folder."""

    def save_pretrained(self, folder: str) -> object: ...


def export_checkpoint(
    quant_model: nn.Module,
    folder: str | os.PathLike[str],
    format: str = "compressed-tensors",
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write a weight-only quantized model as a Hugging Face folder.

    It holds ``config.json``, ``model.safetensors`` and, if the model generates,
    ``generation_config.json``. The integers are those of the model, and
    :func:`torch_quant.load_checkpoint` gives the same outputs, bit for bit with float32. Linear
    layers are written quantized, and a quantized embedding as the floats that it stands for.

    Args:
        quant_model: what ``quantizer.quantize(model)`` returned for a model of transformers, linear
            layers quantized by weights alone: ``recipes.int4_weight_only()``. compressed-tensors
            holds ``recipes.int8_dynamic()``, too.
        folder: a new one, or an empty one; it is written whole or not at all.
        format: ``"compressed-tensors"`` (vLLM, transformers, OpenVINO): symmetric weights of 2, 4
            or 8 bits. ``"gptq"`` (vLLM, SGLang, gptqmodel): of 2, 3, 4 or 8, with zero points too.
        dtype: of all that is not integers, scales included: float32, float16 or bfloat16.
        tokenizer: saved into the folder too, by its ``save_pretrained``.

    Returns:
        The folder.

    Raises:
        InvalidConfig: no quantized model of transformers; a layer that the format cannot hold, with
            the reason; a folder that is not empty or cannot be written.

    >>> export_checkpoint(nn.Linear(4, 2), "int4")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torch_quant.errors.InvalidConfig: expected the model that quantizer.quantize(model) returns, ...
    """
    layout, target = checked_layout(format, dtype), checked_target_folder(folder)
    weights = quantized_weights(quant_model)
    assert isinstance(quant_model, QuantizedModule)
    config = copy.deepcopy(config_of(quant_model))
    embeddings = {name: each for name, each in weights.items() if each.plan.op == "embedding"}
    linear = {name: each for name, each in weights.items() if name not in embeddings}
    _check(layout, quant_model, linear)
    if embeddings:
        logger.warning(
            "%s: a checkpoint holds embeddings in float, so what the codes stand for is written",
            ", ".join(embeddings),
        )
    tensors, tied = _tensors(layout, quant_model, config, linear, embeddings, dtype)
    in_float = [
        name
        for name, module in quant_model.named_modules()
        if issubclass(class_of(module), nn.Linear) and name not in linear
    ]
    describe(config, class_of(quant_model), dtype, tied, layout.config(linear, in_float))
    with staging(target.with_name(f"{target.name}.json")) as stage:
        made = stage / "checkpoint"
        made.mkdir()
        save_tensors(tensors, made / WEIGHTS)
        generation: Any = getattr(quant_model, "generation_config", None)
        if generation is not None and hasattr(generation, "save_pretrained"):
            generation.save_pretrained(str(made))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(made))
        (made / CONFIG).write_text(config.to_json_string(), encoding="utf-8")
        try:
            os.replace(made, target)
        except OSError as error:
            raise InvalidConfig(f"cannot write {target}: {error.strerror}") from error
    return target


def checked_layout(format: str, dtype: torch.dtype) -> Layout:
    """The layout of that name; raises :class:`InvalidConfig` for others, and other dtypes."""
    if format not in LAYOUTS:
        known = " or ".join(map(repr, LAYOUTS))
        hint = did_you_mean(str(format), LAYOUTS)
        raise InvalidConfig(f"export_checkpoint(format={format!r}): expected {known}{hint}")
    if dtype not in _DTYPES:
        expected = ", ".join(map(str, _DTYPES))
        hint = did_you_mean(f"torch.{dtype}".replace("torch.torch", "torch"), map(str, _DTYPES))
        raise InvalidConfig(f"export_checkpoint(dtype={dtype!r}): expected one of {expected}{hint}")
    return LAYOUTS[format]


def _check(layout: Layout, model: nn.Module, weights: Mapping[str, QuantizedWeight]) -> None:
    if not weights:
        raise InvalidConfig(
            "no linear layer of the model is quantized: print(quant_model.plan) shows what is"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, weight in weights.items():
        check_held(layout, name, modules.get(name), weight)


def check_held(
    layout: Layout, name: str, module: nn.Module | None, weight: QuantizedWeight
) -> None:
    """Raise :class:`InvalidConfig` if a layout does not hold the weight of a module."""
    reason = layout.refusal(weight)
    if not reason and (module is None or not issubclass(class_of(module), nn.Linear)):
        kind = "no module" if module is None else class_of(module).__name__
        reason = f"it holds the weights of nn.Linear, and this is {kind}"
    if reason:
        raise InvalidConfig(
            f"{name} cannot be written as {layout.name}: {reason}. Leave it in float, "
            f"Quantizer(overrides={{{name!r}: None}}), or quantize it otherwise"
        )


def _tensors(
    layout: Layout,
    model: QuantizedModule,
    config: Any,
    linear: Mapping[str, QuantizedWeight],
    embeddings: Mapping[str, QuantizedWeight],
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], bool]:
    """What is written, and whether the tied weights of the model are tied in it."""
    integers = {name for each in (*linear.values(), *embeddings.values()) for name in each.names}
    held = {name: x for name, x in model.state_dict().items() if name not in integers}
    cls: Any = class_of(model)
    with torch.device("meta"):
        expected = tensors_of(cls._from_config(config))
    found: dict[str, Tensor] = {}
    tied = True
    _check_nothing_else(layout, held, expected, linear)
    for names in dict.fromkeys(tied_names(expected).values()):
        floats: dict[str, Tensor] = {}
        for name in names:
            module, _, last = name.rpartition(".")
            if last == "weight" and module in linear:
                tensors = layout.tensors(linear[module], dtype)
                found |= {f"{module}.{ending}": x for ending, x in tensors.items()}
            elif last == "weight" and module in embeddings:
                floats[name] = embeddings[module].values()
            else:
                floats[name] = _held(held, name, names, cls)
        together = len(floats) == len(names) and _all_equal(list(floats.values()))
        tied = tied and (together or len(names) == 1)
        for name in list(floats)[: 1 if together else None]:
            x = floats[name]
            found[name] = (x.to(dtype) if x.is_floating_point() else x).contiguous()
    return found, tied


def _check_nothing_else(
    layout: Layout,
    held: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    linear: Mapping[str, QuantizedWeight],
) -> None:
    """Raise where a layer computes with more than a linear layer has."""
    for name in held:
        module = name.rpartition(".")[0]
        if module in linear and name not in expected:
            transforms = ", ".join(map(str, linear[module].plan.transforms))
            raise InvalidConfig(
                f"{module} cannot be written as {layout.name}: it also computes with {name}, which "
                f"{transforms or 'the graph'} adds and a checkpoint does not hold"
            )


def _held(held: Mapping[str, Tensor], name: str, names: tuple[str, ...], cls: type) -> Tensor:
    """The float tensor of that name, or of another name that the model has for it."""
    for each in (name, *names):
        if each in held:
            return held[each]
    raise InvalidConfig(
        f"the quantized model has no {name} any more, which the checkpoint of a {cls.__name__} "
        'holds: quantize it with capture="modules"'
    )


def _all_equal(tensors: list[Tensor]) -> bool:
    return all(x is tensors[0] or torch.equal(x, tensors[0]) for x in tensors[1:])


def describe(config: Any, cls: type, dtype: torch.dtype, tied: bool, about: dict[str, Any]) -> None:
    """Write into the configuration what is in the folder.

    Args:
        config: of transformers, of the model.
        cls: of the model.
        dtype: of what is not integers.
        tied: whether tensors that the model ties are one in the folder.
        about: the ``quantization_config``.
    """
    texts = [config, config.get_text_config()]
    for each in texts:
        if not tied and getattr(each, "tie_word_embeddings", False):
            each.tie_word_embeddings = False
    config.dtype = dtype
    config.architectures = [cls.__name__]
    config.quantization_config = about
