"""The comparison operator by operator sees an operator that errs, and says which."""

from __future__ import annotations

from pathlib import Path

import pytest
from flows import calibrated
from models import normal, seeded
from onnx_files import needs, written
from onnx_steps import compare_steps
from torch import nn

from torch_quant import Backend, sqnr
from torch_quant.backends import ReferenceBackend

pytestmark = needs("onnx", "onnxscript", "onnxruntime")


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_one_bias_off_by_a_tenth_of_a_step(kind: str, tmp_path: Path) -> None:
    import onnx

    layers = (
        [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)]
        if kind == "linear"
        else [nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    )
    model, file = seeded(lambda: nn.Sequential(*layers)), tmp_path / "model.onnx"
    x = normal(200, 16) if kind == "linear" else normal(16, 16, 9, 9)
    quantizer = calibrated(model, [((x,), {})], backend="onnx")
    quant_model = written(quantizer, model, ((x,), {}), file)
    simulation = quantizer.quantize(model, backend=ReferenceBackend(Backend.ONNX))
    steps = compare_steps(file, quant_model, simulation, ((x,), {}))
    assert max(steps.apart.values()) <= 1
    assert max(steps.error.values()) <= 0.02
    assert all(sqnr(*pair) >= 60 for pair in zip(*steps.outputs, strict=True))

    proto = onnx.load(file)
    constants = {each.name: each for each in proto.graph.initializer}
    product = next(each for each in proto.graph.node if each.op_type in ("Conv", "Gemm"))
    bias = next(each for each in proto.graph.node if each.output[0] == product.input[2])
    _, behind, *_ = (each for each in proto.graph.node if each.op_type == "QuantizeLinear")
    codes, scale, step = (
        onnx.numpy_helper.to_array(constants[name]) for name in (*bias.input[:2], behind.input[1])
    )
    moved = codes + (0.1 * step / scale).astype(codes.dtype)
    constants[bias.input[0]].CopyFrom(onnx.numpy_helper.from_array(moved, bias.input[0]))
    onnx.save(proto, file)
    steps = compare_steps(file, quant_model, simulation, ((x,), {}))
    assert 0.08 <= steps.error[behind.output[0]] <= 0.12
    assert max(error for name, error in steps.error.items() if name != behind.output[0]) <= 0.02
