"""Every architecture as an ONNX file: valid, fused, and as good as its simulation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from flows import CASES, Case, run
from onnx_files import feeds, needs, run_onnxruntime, tensors, written

from torch_quant import Backend, Quantizer, UnsupportedOp, sqnr
from torch_quant.backends import ReferenceBackend
from torch_quant.backends.quantized import QuantizedRegion

pytestmark = [
    needs("onnx", "onnxscript", "onnxruntime"),
    pytest.mark.skipif(
        torch.__version__.startswith("2.8."),
        reason="the exporter is tested on the newest torch, files of every architecture take long",
    ),
]

NO_FORM = {
    "mixtral": "transformers.grouped_mm_fallback, in float neither",
}
"""Architectures with an operator that PyTorch's exporter has no form for."""

SPREAD = 1.0
"""dB. Of these random networks the reference itself moves by 1.5 dB on 3 samples and by 0.3 on 96
if its input changes by a hundred-thousandth; here are 27 samples."""

DIFFERENT = {
    "bert", "roberta", "albert", "deberta", "squeezebert", "funnel", "modernbert", "fnet", "gpt2",
    "gpt_neox", "opt", "llama_cache", "gemma2", "bloom", "mixtral", "t5", "bart", "resnet",
    "regnet", "mobilenet_v2", "efficientnet", "convnext", "vit", "swin", "mobilevitv2", "segformer",
    "wav2vec2", "whisper", "clip",
}  # fmt: skip
"""One of each kind, for every run; ``make test-onnx`` takes all, which is five minutes."""

ARCHITECTURES = {
    name: case
    for name, case in CASES.items()
    if case.kind != "awkward" and (name in DIFFERENT or "ALL_ARCHITECTURES" in os.environ)
}


def test_the_chosen_exist() -> None:
    assert {name for name in CASES if name in DIFFERENT} == DIFFERENT


@pytest.mark.parametrize("case", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
def test_file_of_an_architecture(case: Case, tmp_path: Path) -> None:
    model = case.build()
    quantizer = Quantizer("onnx")
    calib_model = quantizer.calib(model)
    for inputs in case.ones():
        run(calib_model, inputs)
    if _in_pieces(quantizer.quantize(model)):
        pytest.skip("captured in pieces; tests/io/test_export_onnx.py exports such")
    file = tmp_path / "model.onnx"
    if case.name in NO_FORM:
        with pytest.raises(UnsupportedOp, match="has no ONNX form"):
            written(quantizer, model, case.inputs(2), file)
        return
    quant_model = written(quantizer, model, case.inputs(2), file)
    simulation = quantizer.quantize(model, backend=ReferenceBackend(Backend.ONNX.placement()))
    report = Backend.ONNX.verify(file)
    assert report.ok, str(report)
    quality: dict[str, list[float]] = {"file": [], "simulation": []}
    for batch in (3, 24):
        expected = tensors(model, case.inputs(batch))
        found = run_onnxruntime(file, feeds(quant_model, case.inputs(batch)))
        assert [x.shape for x in found] == [x.shape for x in expected]
        quality["file"].append(sqnr(expected, found))
        quality["simulation"].append(sqnr(expected, tensors(simulation, case.inputs(batch))))
    # The larger batch says nearly all; the smaller shows that sizes are free.
    assert quality["file"][1] >= quality["simulation"][1] - SPREAD, quality
    assert min(quality["file"]) >= 18, quality


def _in_pieces(quant_model: QuantizedRegion) -> bool:
    return quant_model.glue is not None
