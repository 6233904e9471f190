"""Every architecture on IPEX: compiled, fused, and as near to float as the reference."""

from __future__ import annotations

from collections import Counter

import pytest
from flows import calibrated
from onnx_files import tensors
from quality import compare_quality
from test_onnx_zoo import ONE_SIZE
from zoo import ZOO, ZooEntry, samples

from torch_quant import Backend
from torch_quant.backends import IPEXBackend, ReferenceBackend

pytestmark = pytest.mark.skipif(
    Backend.IPEX.unavailable() is not None, reason=f"Backend.IPEX: {Backend.IPEX.unavailable()}"
)

LOSS = 0.5
"""dB that IPEX may be worse than the reference, end to end."""
DEVIATION = LOSS / 4
"""dB. Two right computations differ by chance; here by ``LOSS`` in one of 30,000 cases."""


@pytest.mark.parametrize("entry", ZOO.values(), ids=lambda entry: entry.name)
def test_architecture(entry: ZooEntry) -> None:
    model = entry.build()
    quantizer = calibrated(model, [((), x) for x in samples(entry.name, 16)], backend="ipex")
    simulation = quantizer.quantize(model, backend=ReferenceBackend(Backend.IPEX.placement()))
    quant_model = quantizer.quantize(model)
    sizes = [entry.inputs]
    if entry.name not in ONE_SIZE:
        sizes.append(entry.other)
    for inputs in sizes:
        for batch in (2, 24):
            quality = compare_quality(
                model, lambda some: tensors(quant_model, some), simulation, inputs, batch, DEVIATION
            )
            assert quality.deviation <= DEVIATION, str(quality)
            assert quality.loss <= LOSS, str(quality)
            assert quality.sqnr >= 18, str(quality)
            print(entry.name, batch, quality)
    report = IPEXBackend().verify(quant_model, entry.inputs(2))
    print(Counter(report.int8), report)
