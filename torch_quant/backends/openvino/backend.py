"""OpenVINO in this process: what ``export_onnx`` writes, called as a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_quant.backends.base import register_backend
from torch_quant.backends.in_process import Session
from torch_quant.backends.onnx.in_process import InProcessBackend
from torch_quant.backends.openvino.forms import FORMS, GRIDS
from torch_quant.errors import BackendUnavailable, UnsupportedOp

__all__ = ["OpenVINOBackend"]

_FLOAT = "f32"
"""What stays in float is computed so: OpenVINO takes bfloat16 where the CPU has it."""


@register_backend
class OpenVINOBackend(InProcessBackend):
    """Graphs of ``Backend.ONNX`` on OpenVINO.

    Inputs are handed over without a copy. Each call has an infer request to itself, so threads may
    call one model at once.

    Args:
        threads: see :class:`InProcessBackend`; ``INFERENCE_NUM_THREADS``.
        settings: properties of a compiled model, ``{"INFERENCE_PRECISION_HINT": "bf16"}``.
        device: OpenVINO's name of it. Tensors go in and come out on the CPU.
        cache_dir: a folder where OpenVINO keeps what it has compiled; None for no such files.

    >>> OpenVINOBackend(threads=2, cache_dir="cache").options()
    {'threads': 2, 'cache_dir': 'cache'}
    """

    grids = GRIDS
    forms = FORMS
    name = "openvino"
    package = "openvino"

    def __init__(
        self,
        *,
        threads: int | None = None,
        settings: Mapping[str, Any] | None = None,
        device: str = "CPU",
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(threads=threads, settings=settings)
        self.device = device
        self.cache_dir = None if cache_dir is None else os.fspath(cache_dir)

    @property
    def has_options(self) -> bool:
        return super().has_options or self.device != "CPU"

    def options(self) -> dict[str, Any]:
        own = {} if self.device == "CPU" else {"device": self.device}
        return super().options() | own | ({"cache_dir": self.cache_dir} if self.cache_dir else {})

    def open(self, program: bytes | Path, inputs: Sequence[str]) -> Session:
        import openvino

        properties: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _FLOAT,
        }
        if self.device == "CPU":
            properties |= {"INFERENCE_NUM_THREADS": self.threads_now(), "NUM_STREAMS": 1}
        if self.cache_dir:
            properties["CACHE_DIR"] = self.cache_dir
        core = openvino.Core()
        if not self._exists(core.available_devices):
            raise BackendUnavailable(
                f"OpenVINOBackend(device={self.device!r}): OpenVINO {self.version} sees no such "
                f"device here; there is {', '.join(core.available_devices)}"
            )
        try:
            if isinstance(program, Path):
                core.set_property({"ENABLE_MMAP": False})  # the file goes when this returns
            model = core.read_model(program)
            compiled = core.compile_model(model, self.device, properties | self.settings)
        except Exception as error:  # OpenVINO raises RuntimeError, whatever the matter is
            raise UnsupportedOp(f"OpenVINO does not load it: {error}") from error
        return _OvSession(compiled, inputs)

    def _exists(self, devices: list[str]) -> bool:
        """Whether the device is one of ``devices``, a kind of them, or a choice among them."""
        kind = self.device.partition(":")[0]
        found = any(each == kind or each.startswith(f"{kind}.") for each in devices)
        return found or kind in ("AUTO", "MULTI", "HETERO", "BATCH")


class _OvSession:
    """A compiled model that takes and gives PyTorch's tensors.

    Args:
        compiled: it has no place for an input that nothing reads.
        inputs: names in the order of the tensors.
    """

    def __init__(self, compiled: Any, inputs: Sequence[str]) -> None:
        self.compiled, self.count = compiled, len(compiled.outputs)
        known = [each.get_names() for each in compiled.inputs]
        self.places = [
            (i, place)
            for i, name in enumerate(inputs)
            for place, names in enumerate(known)
            if name in names
        ]
        """Of each input that is read: its place among the tensors, and in the model."""
        self.requests: list[Any] = []
        """Those that no call has now."""

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        try:
            request = self.requests.pop()
        except IndexError:
            request = self.compiled.create_infer_request()
        for i, place in self.places:
            request.set_input_tensor(place, _shared(tensors[i]))
        request.infer()
        results = [_taken(request.get_output_tensor(i)) for i in range(self.count)]
        self.requests.append(request)
        return results


def _taken(found: Any) -> Tensor:
    """A copy of an output, whose memory the next call with this infer request writes to."""
    if found.element_type.get_type_name() != _NO_ARRAY:
        return torch.from_numpy(found.data.copy())
    x = torch.empty(tuple(found.shape), dtype=torch.bfloat16)
    found.copy_to(_shared(x))
    return x


_NO_ARRAY = "bf16"


def _shared(x: Tensor) -> Any:
    """OpenVINO's view of a contiguous tensor."""
    import openvino

    if x.dtype is torch.bfloat16:
        return openvino.Tensor(x.view(torch.int16).numpy(), list(x.shape), openvino.Type.bf16)
    return openvino.Tensor(x.numpy(), shared_memory=True)
