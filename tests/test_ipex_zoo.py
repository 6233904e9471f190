"""Every architecture on IPEX: compiled, fused, and as near to float as the reference."""

from __future__ import annotations

import itertools

import pytest
from flows import calibrated
from onnx_files import tensors
from processor import WEIGHT_BITS
from quality import DEVIATION, LOSS, compare_quality
from thinning import LONG
from zoo import ARCHITECTURES, ONE_SIZE, ZooEntry, samples

from torch_quant import Backend, CaptureFailed
from torch_quant.backends import ReferenceBackend

pytestmark = pytest.mark.skipif(
    Backend.IPEX.unavailable() is not None, reason=f"Backend.IPEX: {Backend.IPEX.unavailable()}"
)

SPECIALIZED = {
    "mobilenet_v1": "computes paddings in Python: exported for one size",
}
"""More architectures that torch 2.8 exports for one size, and why."""

NOT_COMPILED = {"funnel", "beit", "vit_mae"}
"""Architectures that write to parts of a tensor, which IPEX would leave out: they run unfused."""

SATURATION = 0.0 if WEIGHT_BITS == 8 else 2.0
"""dB that attention may lose where products of two 8-bit activations saturate: without VNNI."""


FEW = {"bert", "whisper", "efficientnet"}
"""Of each family; the others, which IPEX takes a while to compile, have their operators."""
TAKEN = [entry for entry in ARCHITECTURES if LONG or entry.name in FEW]


@pytest.mark.parametrize("entry", TAKEN, ids=lambda entry: entry.name)
def test_architecture(entry: ZooEntry) -> None:
    model = entry.build()
    batches = [((), x) for x in samples(entry.name, 16)]
    quantizer = calibrated(model, batches, backend="ipex", unseen_calls="error")
    simulation = quantizer.quantize(model, backend=ReferenceBackend(Backend.IPEX))
    quant_model = quantizer.quantize(model)
    sizes = [entry.inputs]
    if entry.name in ONE_SIZE | SPECIALIZED:
        with pytest.raises(
            (CaptureFailed, RuntimeError), match=r"quantized for other inputs|must match the size"
        ):
            quant_model(**entry.other(2))
    else:
        sizes.append(entry.other)
    every = list(itertools.product(sizes, (2, 24)))
    some = every if LONG else [every[0], every[-1]]
    for inputs, batch in (*some, every[0]):  # the first size once more: see hazard 14
        quality = compare_quality(
            model, lambda data: tensors(quant_model, data), simulation, inputs, batch, DEVIATION
        )
        assert quality.deviation <= DEVIATION, str(quality)
        assert quality.loss <= LOSS + SATURATION, str(quality)
        assert quality.sqnr >= 18, str(quality)
    report = Backend.IPEX.verify(quant_model, entry.inputs(2))
    reason = "writes to a tensor through a view" if entry.name in NOT_COMPILED else "broadcast"
    assert all(reason in each for each in report.left_out.values()), str(report)
    assert bool(report.left_out) or entry.name not in NOT_COMPILED
