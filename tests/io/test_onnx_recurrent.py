"""LSTMs, GRUs and plain RNNs in ONNX files: PyTorch's numbers, at every length and batch."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import calibrated
from models import normal
from onnx_files import (
    check_free_sizes,
    feeds,
    free_sizes,
    needs,
    operators,
    run_onnxruntime,
    run_openvino,
    tensors,
    written,
)  # fmt: skip
from torch import Tensor, fx, nn

from torch_quant import sqnr
from torch_quant.backends.onnx.program.ops import own_forms
from torch_quant.backends.onnx.program.recurrent import recurrent_layers
from torch_quant.passes.base import PassContext, run_passes

pytestmark = needs("onnx", "onnxscript", "onnxruntime", "openvino")

aten = torch.ops.aten

KINDS: dict[str, tuple[Callable[..., Any], Any, str]] = {
    "lstm": (nn.LSTM, aten.lstm.input, "LSTM"),
    "gru": (nn.GRU, aten.gru.input, "GRU"),
    "tanh": (nn.RNN, aten.rnn_tanh.input, "RNN"),
    "relu": (lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k), aten.rnn_relu.input, "RNN"),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "layers": {"num_layers": 3},
    "both": {"bidirectional": True},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


def _graph(kind: str, model: Any) -> fx.GraphModule:
    """The operator itself, with a given initial state."""
    target, flags = KINDS[kind][1], (model.num_layers, 0.0, False, model.bidirectional)
    graph = fx.Graph()
    x, h = graph.placeholder("x"), graph.placeholder("h")
    states: Any = [h, graph.placeholder("c")] if kind == "lstm" else h
    weights = {f"p{i}": each for i, each in enumerate(model._flat_weights)}
    params = [graph.get_attr(name) for name in weights]
    args = (x, states, params, model.bias, *flags, model.batch_first)
    results = graph.call_function(target, args)
    count = 3 if kind == "lstm" else 2
    graph.output(tuple(graph.call_function(operator.getitem, (results, i)) for i in range(count)))
    return fx.GraphModule(nn.ParameterDict(weights), graph)


@pytest.mark.thin
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_runtimes_give_pytorchs_numbers(kind: str, form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = KINDS[kind][0](8, 6, **FORMS[form]).eval()
    cells = model.num_layers * (2 if model.bidirectional else 1)

    def inputs(batch: int, steps: int) -> tuple[Tensor, ...]:
        shape = (batch, steps, 8) if model.batch_first else (steps, batch, 8)
        states = (normal(cells, batch, 6, salt=i).tanh() for i in (1, 2))
        return (normal(*shape), *states)[: 3 if kind == "lstm" else 2]

    gm = _graph(kind, model)
    expected = {size: gm(*inputs(*size)) for size in ((3, 7), (1, 5), (4, 1))}
    assert run_passes(PassContext(gm), [recurrent_layers])["recurrent_layers"] == 1
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(
        gm,
        inputs(3, 7),
        dynamic_shapes=({0: auto, 1: auto}, *[{1: auto}] * (len(inputs(1, 1)) - 1)),
    )
    program = torch.onnx.export(
        exported, dynamo=True, verbose=False, custom_translation_table=own_forms()
    )
    assert program is not None
    program.save(tmp_path / "m.onnx")
    assert operators(tmp_path / "m.onnx").count(KINDS[kind][2]) == model.num_layers
    for size, wanted in expected.items():
        feed = dict(zip("xhc", (x.numpy() for x in inputs(*size)), strict=False))
        for runtime in (run_onnxruntime, run_openvino):
            for x, y in zip(wanted, runtime(tmp_path / "m.onnx", feed), strict=True):
                torch.testing.assert_close(y, x, rtol=0, atol=2e-5)


class Reader(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(8, 8), KINDS[kind][0](8, 6, **options)
        self.head = nn.Linear(6 * (2 if options.get("bidirectional") else 1), 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x))[0])


@pytest.mark.parametrize("form", ["plain", "all"])
def test_a_file_serves_every_length(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Reader("lstm", **FORMS[form]).eval()
    inputs = ((normal(4, 10, 8),), {})
    quantizer = calibrated(model, [((normal(32, 10, 8),), {})], backend="onnx")
    quant_model = written(quantizer, model, inputs, tmp_path / "m.onnx")
    assert "LSTM" in operators(tmp_path / "m.onnx")
    assert check_free_sizes(tmp_path / "m.onnx", quant_model, inputs) == ["batch", "x_1"]


@pytest.mark.skipif(
    torch.__version__.startswith("2.8."),
    reason="torch 2.8 unrolls it into nodes that onnxruntime does not load: export with torch 2.13",
)
def test_a_size_that_cannot_be_free_is_fixed_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ONNX knows no LSTM with projections, so it is unrolled over the example's steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 6, proj_size=3, batch_first=True)).eval()
    inputs = ((normal(4, 10, 8),), {})
    quantizer = calibrated(model, [((normal(32, 10, 8),), {})], backend="onnx")
    quant_model = written(quantizer, model, inputs, tmp_path / "m.onnx")
    assert "serves sizes as in the example only: lstm at 1" in caplog.text
    assert free_sizes(tmp_path / "m.onnx") == {}
    found = run_onnxruntime(tmp_path / "m.onnx", feeds(quant_model, inputs))
    assert sqnr(tensors(quant_model, inputs), found) > 25
