"""onnxruntime's CPU provider in this process: what ``export_onnx`` writes, called as a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, from_numpy
from torch.utils.dlpack import from_dlpack

from torch_quant.backends.base import register_backend
from torch_quant.backends.in_process import Session
from torch_quant.backends.onnx.in_process import InProcessBackend
from torch_quant.errors import UnsupportedOp

__all__ = ["OnnxRuntimeBackend"]


@register_backend
class OnnxRuntimeBackend(InProcessBackend):
    """Graphs of ``Backend.ONNX`` on onnxruntime's CPU provider.

    Inputs and outputs are handed over without a copy. Idle threads stop spinning when a call ends,
    since PyTorch's may run next.

    Args:
        threads: see :class:`InProcessBackend`; ``intra_op_num_threads``.
        settings: configuration entries of a session, ``{"session.set_denormal_as_zero": "1"}``.

    >>> OnnxRuntimeBackend(threads=2).options()
    {'threads': 2}
    """

    name = "onnxruntime"
    package = "onnxruntime"

    def open(self, program: bytes | Path, inputs: Sequence[str]) -> Session:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads_now(), 1
        options.log_severity_level = 3
        for key, value in {"session.force_spinning_stop": "1", **self.settings}.items():
            options.add_session_config_entry(key, str(value))
        try:
            session = onnxruntime.InferenceSession(
                program, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of onnxruntime's own classes
            raise UnsupportedOp(f"onnxruntime does not load it: {error}") from error
        return _OrtSession(session)


class _OrtSession:
    """A session that takes and gives PyTorch's tensors, as arrays over the same memory."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs = [each.name for each in session.get_inputs()]
        self.outputs = [each.name for each in session.get_outputs()]
        types = {each.type for each in (*session.get_inputs(), *session.get_outputs())}
        if _NO_ARRAY in types and not hasattr(_ort_value(), "from_dlpack"):
            raise UnsupportedOp("onnxruntime takes and gives bfloat16 from version 1.32 on")
        self.run = self._by_dlpack if _NO_ARRAY in types else self._by_arrays

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.run(dict(zip(self.inputs, tensors, strict=True)))

    def _by_arrays(self, feed: dict[str, Tensor]) -> list[Tensor]:
        arrays = self.session.run(self.outputs, {name: x.numpy() for name, x in feed.items()})
        return [from_numpy(x) for x in arrays]

    def _by_dlpack(self, feed: dict[str, Tensor]) -> list[Tensor]:
        """Five times the overhead, and NumPy has no bfloat16."""
        values = {name: _ort_value().from_dlpack(x) for name, x in feed.items()}
        return [from_dlpack(x) for x in self.session.run_with_ort_values(self.outputs, values)]


_NO_ARRAY = "tensor(bfloat16)"


def _ort_value() -> Any:
    import onnxruntime

    return onnxruntime.OrtValue
