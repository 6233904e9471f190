"""A new recipe: a function that gives a QConfig."""

from __future__ import annotations

from pathlib import Path

from contract import check_workflow
from models import MODELS, example

from torch_quant import QConfig, Quantizer, QuantSpec, register_recipe


def test_a_recipe_is_one_function(tmp_path: Path) -> None:
    @register_recipe
    def six_bits(*, symmetric: bool = False) -> QConfig:
        weight = QuantSpec.of(bits=6, signed=True, symmetric=True, per_channel=True)
        return QConfig(QuantSpec.of(bits=6, symmetric=symmetric), weight)

    path = tmp_path / "q.yaml"
    path.write_text("backend: reference\nqconfig: {recipe: six_bits, symmetric: true}\n")
    config = Quantizer.from_config(path).qconfig
    assert config == six_bits(symmetric=True)
    quantizer, _ = check_workflow(
        MODELS["mlp"](),
        (example("mlp", 16), {}),
        "2",
        tmp_path,
        least=15.0,
        backend="reference",
        qconfig=config,
    )
    assert quantizer.plan["2"].weight == config.weight
