"""Saved quantized models: a folder of JSON and safetensors, with nothing in it that runs."""

from __future__ import annotations

import os

import torch
from torch import nn

from torch_quant.convert.quantized import QuantizedModule, check_finished
from torch_quant.errors import InvalidConfig
from torch_quant.io.folder import read_folder, write_folder
from torch_quant.io.model_data import read_model, write_model

__all__ = ["load", "save"]


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a quantized model; :func:`load` gives the same outputs, bit for bit.

    Args:
        model: what ``quantizer.quantize`` returned.
        folder: made if need be; an earlier save in it is replaced, whole or not at all.

    Raises:
        InvalidConfig: it is no quantized model, a part of it is no data (says which), or nothing
            can be written there.

    >>> import tempfile
    >>> from torch_quant import Quantizer
    >>> model, x = nn.Linear(4, 2), torch.ones(8, 4)
    >>> quantizer = Quantizer("reference")
    >>> _ = quantizer.calib(model)(x)
    >>> quant_model = quantizer.quantize(model)
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     save(quant_model, f"{parent}/int8")
    ...     again = load(f"{parent}/int8")
    >>> torch.equal(again(x), quant_model(x))
    True
    """
    if not isinstance(model, QuantizedModule):
        raise InvalidConfig(
            f"expected the model that quantizer.quantize(model) returns, got {type(model).__name__}"
        )
    check_finished(model)
    data, tensors = write_model(model)
    write_folder(folder, "model", data, tensors)


def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The quantized model that :func:`save` saved. It executes nothing that the folder holds.

    Args:
        folder: where it is.
        model: a model of the class that was quantized, whose weights are not read: it may be on the
            meta device. With it, the result is of this class, with its attributes and methods
            (``generate``). It is needed where the quantized model runs Python code of its class.

    Raises:
        InvalidConfig: there is none; it is truncated, was changed since, or is of a newer version;
            ``model`` is another one, or is needed. Says which.
        BackendUnavailable: its backend does not run on this machine.

    >>> load("nowhere")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torch_quant.errors.InvalidConfig: cannot read nowhere/model.json: No such file ...
    """
    if model is not None and not isinstance(model, nn.Module):
        raise InvalidConfig(f"expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, QuantizedModule):
        raise InvalidConfig("the model is quantized already; give one of the float model's class")
    data, tensors = read_folder(folder, "model")
    with torch.no_grad():
        return read_model(data, tensors, model)
