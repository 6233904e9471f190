"""Random programs that once broke a promise, made short."""

from __future__ import annotations

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
