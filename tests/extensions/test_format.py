"""A new number format: an instance of an element type, and its name wherever formats are given."""

from __future__ import annotations

import json
from pathlib import Path

from contract import check_workflow
from models import MODELS, example

from torch_quant import FloatType, PerGroup, QConfig, Quantizer, QuantSpec, register_element_type

FLOAT5 = FloatType("float5_e2m2", exponent_bits=2, mantissa_bits=2)


def test_a_format_is_one_instance(tmp_path: Path) -> None:
    register_element_type(FLOAT5)
    spec = QuantSpec.of("float5_e2m2")
    grouped = QuantSpec.of("float5_e2m2", granularity=PerGroup(8))
    model, x = MODELS["mlp"](), example("mlp", 16)
    quantizer, _ = check_workflow(
        model,
        (x, {}),
        "2",
        tmp_path,
        least=8.0,
        backend="reference",
        qconfig=QConfig(input=spec, weight=grouped, observer="histogram"),
    )
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert {site["weight"]["element"] for site in saved["sites"]} == {"float5_e2m2"}
    again = Quantizer.from_config(quantizer.to_config())
    assert again.qconfig == quantizer.qconfig
    again.calib(model)(*x)
    assert again.explain("2")["weight"].value.element == FLOAT5
