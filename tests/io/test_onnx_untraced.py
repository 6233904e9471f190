"""Programs are traced anew only where an operator is written out, and the file is the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from flows import calibrated
from models import normal, seeded
from onnx_files import feeds, needs, operators, run_onnxruntime, written
from torch import Tensor, nn
from torch.export import ExportedProgram

from torch_quant import sqnr
from torch_quant.backends.onnx.program import untraced

pytestmark = needs("onnx", "onnxscript", "onnxruntime")


class Mixed(nn.Module):
    """Layers, masked attention, which has a cast of its own, numbers and a free length."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 24), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.up(self.norm(x)).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        mask = x[..., 0].gt(-3.0)[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.down(y * (x.shape[1] + 2)) + (x * 2).double().sum(1, keepdim=True).float()


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.fft.fft2(self.layer(x)))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many nodes each program had that was traced anew."""
    found: list[int] = []
    plain = ExportedProgram.run_decompositions

    def noted(self: ExportedProgram, *args: object, **options: object) -> ExportedProgram:
        found.append(len(self.graph.nodes))
        return plain(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ExportedProgram, "run_decompositions", noted)
    return found


def test_the_file_is_that_of_a_program_traced_anew(
    tmp_path: Path, traced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = seeded(Mixed), [((normal(2, 5, 8),), {}), ((normal(3, 4, 8),), {})]
    quantizer, kinds, outputs = calibrated(model, inputs), [], []
    for name in ("taken", "traced"):
        file = tmp_path / f"{name}.onnx"
        quant_model = written(quantizer, model, inputs[0], file)
        kinds.append(Counter(operators(file)))
        outputs.append(run_onnxruntime(file, feeds(quant_model, inputs[1])))
        assert len(traced) == (name == "traced")
        monkeypatch.setattr(untraced, "stays", lambda node, table: False)
    assert kinds[0] == kinds[1]
    assert sqnr(*outputs) > 100


def test_what_is_written_out_is_traced(tmp_path: Path, traced: list[int]) -> None:
    model, inputs = seeded(Spectrum), ((normal(2, 5, 8),), {})
    written(calibrated(model, [inputs]), model, inputs, tmp_path / "model.onnx")
    assert traced
