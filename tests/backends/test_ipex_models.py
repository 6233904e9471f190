"""MiniLM and ResNet-50 on IPEX: all of the plan is fused, and as good as the reference."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import images
from thinning import rarely
from torch import Tensor, nn

from torch_quant import Backend, Quantizer, recipes, sqnr
from torch_quant.backends import IPEXBackend, ReferenceBackend

pytestmark = pytest.mark.skipif(
    Backend.IPEX.unavailable() is not None, reason=f"Backend.IPEX: {Backend.IPEX.unavailable()}"
)

ROOT = Path(__file__).parents[2]


def minilm() -> tuple[nn.Module, dict[str, Tensor], dict[str, int]]:
    """The pretrained all-MiniLM-L6-v2; 36 layers, the pooler, two products in each attention."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from minilm_data import model_folder
    finally:
        sys.path.pop(0)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (4, 32), generator=generator)
    mask = torch.ones(4, 32, dtype=torch.int64)
    mask[0, 20:] = 0
    model = AutoModel.from_pretrained(model_folder()).eval()
    return model, {"input_ids": ids, "attention_mask": mask}, {"linear": 37, "matmul": 12}


def resnet50() -> tuple[nn.Module, dict[str, Tensor], dict[str, int]]:
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    return ResNetModel(ResNetConfig()).eval(), {"pixel_values": images(1, 96)}, {"conv": 53}


@pytest.mark.parametrize("build", [minilm, rarely(resnet50)])
def test_all_of_the_plan_is_fused(build: Any) -> None:
    model, inputs, products = build()
    quantizer = Quantizer("ipex", qconfig=recipes.fast())  # biases are not the subject
    quantizer.calib(model)(**inputs)
    expected = tuple(model(**inputs).values())
    reference = quantizer.quantize(model, backend=ReferenceBackend(Backend.IPEX))
    quant_model = quantizer.quantize(model, example_inputs=inputs)
    error = sqnr(expected, tuple(quant_model(**inputs).values()))
    assert error > sqnr(expected, tuple(reference(**inputs).values())) - 0.5
    report = IPEXBackend().verify(quant_model, inputs)
    assert report.complete, str(report)
    assert report.int8 == products
    assert quantizer.plan.coverage == 1.0
