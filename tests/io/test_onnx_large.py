"""Files of large graphs: the same operators as of small ones, without what takes their square."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flows import calibrated
from models import normal, seeded
from onnx_files import feeds, needs, operators, run_onnxruntime, written
from torch import Tensor, nn

from torch_quant import sqnr
from torch_quant.backends.onnx.program import large, translate

pytestmark = [
    needs("onnx", "onnxscript", "onnxruntime"),
    pytest.mark.skipif(
        torch.__version__.startswith("2.8."),
        reason="what is written is the file; once is enough, on the newest torch",
    ),
]


class Gated(nn.Module):
    """Constants to fold, slices of one tensor, an operator that ONNX has not, and free sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        gate = both[..., :8] * torch.arange(8.0).add(1).reciprocal()
        return self.down(F.silu(gate) * both[..., 8:]).reshape(x.shape[0], -1, 8)


def _inputs(rows: int, length: int) -> Any:
    return (normal(rows, length, 8),), {}


def test_the_file_of_a_large_graph_computes_what_that_of_a_small_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeded(lambda: nn.Sequential(*[Gated() for _ in range(2)])).eval()
    batches = [_inputs(2, 5), _inputs(3, 4)]
    quantizer = calibrated(model, batches)
    files = {"small.onnx": translate.LARGE, "large.onnx": 0}
    kinds, outputs = [], []
    for name, most in files.items():
        monkeypatch.setattr(translate, "LARGE", most)
        quant_model = written(quantizer, model, batches[0], tmp_path / name)
        kinds.append(set(operators(tmp_path / name)) - {"Split", "Slice"})
        feed = feeds(quant_model, batches[1])
        outputs.append(run_onnxruntime(tmp_path / name, feed))
    assert kinds[0] == kinds[1]
    assert sqnr(*outputs) > 60


def test_rules_that_search_the_graph_for_each_node_are_left_out() -> None:
    from onnxscript import rewriter

    rules = large._rules(rewriter)
    kept = [each for each in rules if large._one_output(each)]
    assert len(rules) > len(kept) > 10


def test_an_onnxscript_with_other_steps_optimizes_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxscript import optimizer

    monkeypatch.delattr(optimizer, "fold_constants")
    monkeypatch.setattr(translate, "LARGE", 0)
    optimized: list[Any] = []
    plain = torch.onnx.ONNXProgram.optimize

    def optimize(program: Any) -> None:
        optimized.append(program)
        plain(program)

    monkeypatch.setattr(torch.onnx.ONNXProgram, "optimize", optimize)
    model = seeded(Gated).eval()
    quantizer = calibrated(model, [_inputs(2, 5)])
    written(quantizer, model, _inputs(2, 5), tmp_path / "model.onnx")
    assert optimized
