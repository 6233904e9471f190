"""AMP proxies that have seen data, and what the tests of them and of fallback compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from flows import calibrated
from models import MODELS, example
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant import Quantizer, sqnr
from torch_quant.amp.proxy import AmpModel

__all__ = [
    "MODES",
    "Ready",
    "achieved",
    "analysed",
    "assert_same",
    "facts",
    "fresh",
    "ready",
]

Ready = tuple[nn.Module, Quantizer, AmpModel]

MODES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def ready(model: nn.Module, x: Tensor, *, backend: str = "reference", **options: Any) -> Quantizer:
    """A quantizer that has seen ``x``."""
    return calibrated(model, [((x,), {})], backend=backend, **options)


def fresh(quantizer: Quantizer, model: nn.Module, *inputs: Tensor, **options: Any) -> AmpModel:
    """A proxy made now, which has seen one batch."""
    amp_model = quantizer.amp(model, **options)
    amp_model(*inputs)
    return amp_model


def analysed(name: str = "mlp", backend: str = "reference", **options: Any) -> Ready:
    """A calibrated quantizer, and an AMP proxy that has seen one batch of 16, which it keeps."""
    model = MODELS[name]()
    quantizer = calibrated(model, [(example(name, 32), {})], backend=backend)
    amp_model = quantizer.amp(model, **options)
    amp_model(*example(name, 16))
    return model, quantizer, amp_model


def assert_same(outputs: Any, expected: Any) -> None:
    """The same containers and tensors, bit for bit, and none with a gradient."""
    assert type(outputs) is type(expected)
    for x, y in zip(_tensors(outputs), _tensors(expected), strict=True):
        assert torch.equal(x, y)
        assert not x.requires_grad
        assert x.grad_fn is None


def facts(amp_model: AmpModel) -> Any:
    """All that a batch changes in a proxy, to be compared."""
    recorder = amp_model.recorder
    return (
        recorder.batches,
        recorder.output_signal,
        {name: vars(stats).copy() for name, stats in recorder.sites.items()},
        recorder.gram.draws,
        recorder.gram.matrix.tolist(),
        len(amp_model.samples),
        amp_model.metric,
    )


def achieved(model: nn.Module, quantizer: Quantizer, x: tuple[Tensor, ...]) -> float:
    """Output SQNR by a run, dB."""
    return sqnr(model(*x), quantizer.quantize(model)(*x))


def _tensors(outputs: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
