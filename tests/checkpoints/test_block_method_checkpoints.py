"""What methods that work on blocks give is written as any other: scales are in the parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_models import DECODERS, IN_FLOAT, ids, same_integers

from torch_quant import (
    AWQ,
    FLOAT,
    GPTQ,
    TEQ,
    AutoRound,
    PerGroup,
    QConfig,
    Quantizer,
    QuantSpec,
    Transform,
    WeightMethod,
    export_checkpoint,
    load_checkpoint,
)


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize(
    ("method", "transform"),
    [
        (GPTQ(full_range=True), AWQ()),
        (AutoRound(iterations=2, full_range=True), TEQ(iterations=2, learning_rate=0.1)),
    ],
    ids=["awq-gptq", "teq-autoround"],
)
def test_scaled_layers_and_negative_scales(
    layout: str, method: WeightMethod, transform: Transform, tmp_path: Path
) -> None:
    model = DECODERS["llama"]()
    spec = QuantSpec.of("int4", granularity=PerGroup(32))
    config = QConfig(FLOAT, spec, method=method, transforms=[transform])
    overrides = {**IN_FLOAT, "lm_head": None}
    quantizer = Quantizer("reference", qconfig=config, overrides=overrides)
    quantizer.round_weights(model, [ids(2, 12), ids(2, 9)], progress=False)
    quant_model = quantizer.quantize(model)
    negative = [x < 0 for name, x in quant_model.state_dict().items() if name.endswith("_scale")]
    assert bool(torch.cat([each.flatten() for each in negative]).any())
    folder = export_checkpoint(quant_model, tmp_path / "model", layout)
    again = load_checkpoint(folder, backend="reference")
    assert same_integers(again, quant_model)
    assert torch.equal(again(**ids()).logits, quant_model(**ids()).logits)
