"""Every architecture as an ONNX file: valid, fused, and what the reference computes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from flows import Inputs, calibrated
from onnx_files import feeds, needs, run_session, session, written
from onnx_steps import compare_steps
from quality import DEVIATION, LOSS, compare_quality
from thinning import LONG
from torch import Tensor
from zoo import ARCHITECTURES, ONE_SIZE, ZooEntry, samples

from torch_quant import Backend, CaptureFailed, sqnr
from torch_quant.backends import ReferenceBackend

pytestmark = [
    needs("onnx", "onnxscript", "onnxruntime", "openvino"),
    pytest.mark.skipif(
        torch.__version__.startswith("2.8."),
        reason="the exporter is tested on the newest torch, files of every architecture take long",
    ),
]

ERROR = 0.05
"""Steps that the kernel of one operator may err, on the same integers, before it rounds.

Rounding makes a step of it, near the border of two codes. Measured: up to 0.03.
"""

COARSE_BIAS = {"swinv2": 0.25}
"""More, as a bias is rounded to the step of the product, which two inputs make coarse: 0.22."""

FLOAT = 60.0
"""dB. Float operators behind the last integers; a grid of 8 bits has about 46."""

FLIPS = 15.0
"""dB between a file and its quantized model at other sizes, from the same ranges.

Each is 18 dB or more from the float model, and roundings differ where a value is at the border
of two codes, which random layers carry on: two such errors, if independent, are 15 dB apart.
"""

PRETRAINED = {"bert", "gpt2", "resnet"}
"""Left to ``make test-long``. ``test_onnx_pretrained`` has a BERT in every run and ResNet-50 in the
long one alone; of the decoders ``test_onnx_weights`` has one."""
SLOW = {
    "whisper", "siglip", "convnext", "efficientnet", "modernbert", "deberta", "mixtral",
    "llama_cache",
}  # fmt: skip
"""Left to ``make test-long``: the rest has their operators."""
TAKEN = [entry for entry in ARCHITECTURES if LONG or entry.name not in PRETRAINED | SLOW]


@pytest.mark.parametrize("entry", TAKEN, ids=lambda entry: entry.name)
def test_file_of_an_architecture(entry: ZooEntry, tmp_path: Path) -> None:
    model, file = entry.build(), tmp_path / "model.onnx"
    batches = [((), x) for x in samples(entry.name, 16)]
    quantizer = calibrated(model, batches, backend="onnx", unseen_calls="error")
    example: Inputs = ((), entry.inputs(2))
    quant_model = written(quantizer, model, example, file, least=FLIPS)
    simulation = quantizer.quantize(model, backend=ReferenceBackend(Backend.ONNX))
    report = Backend.ONNX.verify(file)
    assert report.complete, str(report)
    loaded = session(file)

    def run_file(some: Inputs) -> list[Tensor]:
        return run_session(loaded, feeds(quant_model, some))

    sizes = [entry.inputs]
    if entry.name in ONE_SIZE:
        with pytest.raises(CaptureFailed, match="was quantized for other inputs"):
            simulation(**entry.other(2))
    else:
        sizes.append(entry.other)
    every = list(itertools.product(sizes, (3, 24)))
    for inputs, batch in every if LONG else [every[0], every[-1]]:
        steps = compare_steps(file, quant_model, simulation, ((), inputs(batch)))
        assert max(steps.apart.values()) <= 1, steps.apart
        assert max(steps.error.values()) <= COARSE_BIAS.get(entry.name, ERROR), steps.error
        assert all(sqnr(*pair) >= FLOAT for pair in zip(*steps.outputs, strict=True))
        quality = compare_quality(model, run_file, simulation, inputs, batch, DEVIATION)
        assert quality.deviation <= DEVIATION, str(quality)
        assert quality.loss <= LOSS, str(quality)
        assert quality.sqnr >= 18, str(quality)
