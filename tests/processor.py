"""What this processor computes, for tests of kernels that others do not have."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from torch_quant import QConfig, QuantSpec, native
from torch_quant.backends.int8 import has_vnni

__all__ = [
    "COARSER", "WEIGHT_BITS", "exact_weights", "needs_bfloat16", "needs_vnni", "without_kernels",
]  # fmt: skip

WEIGHT_BITS = 8 if has_vnni() else 7
"""Of weights: without VNNI, products of 8-bit weights saturate in 16 bits."""
COARSER = 6.0 * (8 - WEIGHT_BITS)
"""dB of output SQNR that the weights' missing bit may cost."""


def exact_weights() -> QConfig:
    """Formats in which kernels and the reference can agree here."""
    if WEIGHT_BITS == 8:
        return QConfig()
    spec = QuantSpec.of(bits=WEIGHT_BITS, signed=True, symmetric=True, per_channel=True)
    return QConfig(weight=spec)


needs_vnni = pytest.mark.skipif(
    not has_vnni(),
    reason="products of two 8-bit activations saturate without VNNI: run it on a processor with "
    "AVX512-VNNI or AVX-VNNI",
)
needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN has no bfloat16 kernels below AVX512: run it on a processor that has it",
)


def without_kernels(code: str, test: str) -> None:
    """Run code in a process that has none of this package's kernels.

    Args:
        code: may import the modules that lie beside ``test``, and beside this one.
        test: the file of the test.
    """
    environment = os.environ | {native.VARIABLE: "none"}
    folders = (os.path.dirname(each) for each in (test, __file__))
    path = os.pathsep.join([*folders, environment.get("PYTHONPATH", "")])
    run = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(run, check=True, env=environment | {"PYTHONPATH": path})
