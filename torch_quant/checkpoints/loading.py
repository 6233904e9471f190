"""Read a checkpoint of quantized weights into a quantized model, on any backend."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torch_quant.backends import Backend
from torch_quant.checkpoints.skeletons import (
    built,
    listed,
    placeholder,
    put_tensors,
    tensors_of,
    tied_names,
)
from torch_quant.checkpoints.stored import Checkpoint, StoredWeight, opened
from torch_quant.config import OverrideKey, QConfig
from torch_quant.convert.quantized import QuantizedModule
from torch_quant.core.functional import dequantize
from torch_quant.core.spec import FLOAT
from torch_quant.errors import InvalidConfig
from torch_quant.graph.policy import Capture
from torch_quant.graph.twin import twin_of
from torch_quant.quantizer import Quantizer
from torch_quant.unseen import UnseenCalls

__all__ = ["example_of", "load_checkpoint", "quantized_from"]

logger = logging.getLogger("torch_quant")


def load_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    backend: Backend | str | None = None,
    example_inputs: Any = None,
    capture: Capture | None = None,
) -> QuantizedModule:
    """The quantized model that a checkpoint holds, of :func:`torch_quant.export_checkpoint` or of
    others.

    Its codes go into the model as they are; no layer is ever held in float unless the backend has
    no kernel for it. All else is computed in float32.

    Args:
        folder: has ``config.json`` and safetensors: compressed-tensors (``pack-quantized`` or
            ``int-quantized``, activations in float or dynamic per token) or GPTQ (version 1 or 2,
            groups in order).
        model: one of the checkpoint's class, whose weights are not read; the meta device will do.
            By default, transformers builds the architecture that ``config.json`` names.
        backend: where it will run; the best of this machine by default.
        example_inputs: a call of the model, as for :meth:`Quantizer.calib`; by default a few tokens
            as ``input_ids``.
        capture: as for :class:`Quantizer`: layer by layer by default, and whole for
            ``Backend.ONNX``, whose result :func:`torch_quant.export_onnx` writes.

    Returns:
        A quantized model, of the class of the float one.

    Raises:
        InvalidConfig: the checkpoint is damaged, of an unknown layout, or of another model; says
            which file and tensor, what was expected and what came.
        BackendUnavailable: the backend does not run here; or transformers is needed and missing.
        UnsupportedOp: the backend runs nothing of it quantized.

    >>> load_checkpoint("nowhere")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torch_quant.errors.InvalidConfig: cannot read ...nowhere/config.json: No such file ...
    """
    checkpoint = opened(folder)
    is_float = isinstance(model, nn.Module) and not isinstance(model, QuantizedModule)
    if model is not None and not is_float:
        raise InvalidConfig(f"expected a float nn.Module, got {type(model).__name__}")
    skeleton = built(checkpoint.files) if model is None else twin_of(model)
    _fill(skeleton, checkpoint)
    example = example_of(skeleton) if example_inputs is None else example_inputs
    return quantized_from(checkpoint, skeleton, backend, example, capture)


def quantized_from(
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    backend: Backend | str | None,
    example: Any,
    capture: Capture | None = None,
) -> QuantizedModule:
    """A quantized model with the codes of a checkpoint.

    Args:
        checkpoint: has them.
        skeleton: has the float tensors, and placeholders for the rest; it stays alive.
        backend: where it will run.
        example: inputs to capture it with.
        capture: as for :class:`Quantizer`.
    """
    quantizer = Quantizer(
        backend, overrides=_overrides(checkpoint), capture=capture, qconfig=QConfig(FLOAT)
    )
    quantized = _quantized(quantizer, skeleton, example)
    if left := _in_float(quantized, checkpoint.stored):
        logger.warning(
            "%s: %s, so the weight is dequantized", ", ".join(left), _reason(quantized, left[0])
        )
        for name in left:
            codes, qparams = checkpoint.read(name)
            weight = nn.Parameter(dequantize(codes, qparams), requires_grad=False)
            skeleton.get_submodule(name)._parameters["weight"] = weight
        quantized = _quantized(quantizer, skeleton, example)
    _keep(quantized, quantizer, skeleton)
    return quantized


def _overrides(checkpoint: Checkpoint) -> dict[OverrideKey, QConfig | None]:
    """Everything in float, and what is stored quantized as it is stored."""
    found: dict[OverrideKey, QConfig | None] = {"*": None}
    folder = str(checkpoint.files.folder)
    for module, stored in checkpoint.stored.items():
        asked = stored.activation or FLOAT
        found[module] = QConfig(asked, stored.spec, method=StoredWeight(folder, module))
    return found


def example_of(model: nn.Module) -> Any:
    """Inputs that a model of transformers takes.

    Raises:
        InvalidConfig: it is none of them.
    """
    if isinstance(found := getattr(model, "dummy_inputs", None), dict):
        return found
    if not hasattr(model, "config"):
        raise InvalidConfig(
            "how the model is called is not known: load_checkpoint(folder, model, "
            "example_inputs=...), a tensor, a tuple of positional inputs or a dict of keywords"
        )
    return {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}


def _quantized(quantizer: Quantizer, model: nn.Module, example_inputs: Any) -> QuantizedModule:
    made = quantizer.quantize(model, example_inputs=example_inputs, share_float_weights=True)
    for module in made.modules():  # nobody else has the float model
        if isinstance(module, QuantizedModule):
            module.quantization.shared = None
    return made


def _in_float(model: QuantizedModule, modules: Iterable[str]) -> list[str]:
    """Modules whose weight the model has in float, or keeps beside the integers."""
    held = model.state_dict()
    plan = model.quantization.plan

    def is_float(name: str) -> bool:
        weight = held.get(f"{name}.weight")
        kept = weight is not None and weight.is_floating_point()
        return kept or name not in plan or not plan[name].quantized

    return [name for name in modules if is_float(name)]


def _reason(model: QuantizedModule, name: str) -> str:
    site = model.quantization.plan.get(name)
    if site is None:
        return "no call of the example reaches it"
    return site.reason or "Python code of the model reads it"


class _Kept(UnseenCalls):
    """Serves further kinds of calls, and keeps alive what that needs."""

    def __init__(self, known: UnseenCalls, *needed: object) -> None:
        self.__dict__.update(vars(known))
        self._needed = needed


def _keep(quantized: QuantizedModule, quantizer: Quantizer, model: nn.Module) -> None:
    known = quantized.quantization.unseen
    assert isinstance(known, UnseenCalls)
    _Kept(known, quantizer, model).attend(quantized)


# Float tensors


def _fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give a model the float tensors of a checkpoint, and placeholders for the quantized ones."""
    files, stored = checkpoint.files, checkpoint.stored
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, about in stored.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            given = "no such module" if module is None else f"a {type(module).__name__}"
            raise InvalidConfig(
                f"{files.folder} is the checkpoint of another model: it holds a quantized weight "
                f"of {name}, where the {type(model).__name__} has {given}; expected an nn.Linear"
            )
        shape = (module.out_features, module.in_features)
        if shape != about.shape:
            raise InvalidConfig(
                f"{files.file(min(about.tensors))}: the weight of {name} has shape {about.shape}; "
                f"the {type(model).__name__} has {shape} there"
            )
    wanted = tensors_of(model)
    names = tied_names(wanted)
    values: dict[str, Tensor] = {}
    missing = []
    for name, x in wanted.items():
        module, _, last = name.rpartition(".")
        if last == "weight" and module in stored:
            values[name] = placeholder(tuple(x.shape))
            continue
        source = next((each for each in (name, *names[name]) if each in files), None)
        if source is None:
            if isinstance(x, nn.Parameter) or x.device.type == "meta":
                missing.append(name)
        elif source in values:
            values[name] = values[source]
        else:
            files.check(source, tuple(x.shape))
            values[source] = values[name] = _as_held(files.tensor(source), x)
    computed = {name for name, _ in model.named_buffers()}  # which older checkpoints hold, too
    extra = [name for name in checkpoint.floats if name not in {*wanted, *computed}]
    values |= (biases := _biases(checkpoint, extra))
    extra = [name for name in extra if name not in biases]
    if missing or extra:
        raise InvalidConfig(
            f"{files.folder} is the checkpoint of another model: for a {type(model).__name__} it "
            + " and ".join(listed(missing, "lacks") + listed(extra, "has beside its tensors"))
        )
    put_tensors(model, values)
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta":
            raise InvalidConfig(
                f"the buffer {name} of the model is on the meta device and not in the checkpoint: "
                "give a model that was made on the CPU"
            )


def _biases(checkpoint: Checkpoint, names: list[str]) -> dict[str, nn.Parameter]:
    """Biases of quantized layers whose class has none: some tools write them, mostly zeros."""
    found = {}
    for name in names:
        module, _, last = name.rpartition(".")
        if last == "bias" and module in checkpoint.stored:
            checkpoint.files.check(name, checkpoint.stored[module].shape[:1])
            bias = checkpoint.files.tensor(name).to(torch.float32)
            found[name] = nn.Parameter(bias, requires_grad=False)
    return found


def _as_held(value: Tensor, x: Tensor) -> Tensor:
    value = value.to(torch.float32 if value.is_floating_point() else value.dtype)
    return nn.Parameter(value, requires_grad=False) if isinstance(x, nn.Parameter) else value
