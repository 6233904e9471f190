"""Random programs that once broke a promise, made short."""

from __future__ import annotations

import pytest
from programs import Program
from promises import PROMISES


def test_a_model_whose_only_layer_reads_what_is_written_to_in_place() -> None:
    program = Program(
        inputs=("torch.randn(n, 3, 8, 8)",),
        layers=("nn.Linear(64, 8)",),
        lines=(
            "v0 = F.dropout(x0, 0.5, self.training)",
            "F.silu(v0, inplace=True)",
            "v1 = self.m0(x0.flatten(2))",
        ),
        result="v1",
        batches=(6, 1),
    )
    PROMISES["onednn"](program)


@pytest.mark.parametrize("batches", [(6, 1), (1, 6)])
@pytest.mark.parametrize(
    "rows",
    ["x0.squeeze(1)", "x0.squeeze()", "x0.transpose(0, 1).squeeze(0)", "x0[:, 0][None].squeeze(1)"],
)
def test_linear_layers_of_squeezed_tensors(rows: str, batches: tuple[int, int]) -> None:
    program = Program(
        inputs=("torch.randn(n, 1, 7, 5)",),
        layers=("nn.Linear(5, 2)", "nn.Linear(2, 3)"),
        lines=(f"v0 = {rows}", "v1 = F.relu(self.m0(v0))", "v2 = self.m1(v1)"),
        result="v2",
        batches=batches,
    )
    PROMISES["onnx"](program)
