"""Every architecture: captured unchanged, calibrated at batch 1, quantized, run at batch 3."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from flows import BACKENDS, CASES, Case, assert_unchanged, run, snapshot
from multiplications import counted
from processor import COARSER
from thinning import LONG, OLDEST
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import KINDS, ONE_SIZE, ZOO
from zoo_operators import SHOWN, operators_of, same_torch

from torch_quant import Backend, Quantizer, UnsupportedOp, sqnr

# Output SQNR that a case cannot reach, and why.
EXCEPTIONS: dict[str, str] = {}

# (case, backend) without anything to quantize, and why.
LOWER: dict[tuple[str, str], float] = {
    # Results of convolutions are quantized too; 19.6 to 21 dB by the last digit of float sums.
    ("mobilevit", "onnx"): 18.0,
    ("focalnet", "onnx"): 18.0,  # likewise: 19.5, REFERENCE 21.0
}
"""Output SQNR, dB, where a backend cannot be held to 20, each with the reason."""
NOTHING: dict[tuple[str, str], str] = {
    ("einsums", "reference"): "only einsum, which stays float",
    ("einsums", "onednn"): "only einsum, which stays float",
    ("einsums", "ipex"): "only einsum, which stays float",
    ("einsums", "onnx"): "only einsum, which stays float",
}

# Cases that have no gradient, and why.
WITHOUT_GRADIENT: dict[str, str] = {
    "in_place": "writes to the result of relu, which its gradient needs",
    "in_place_after_read": "writes to the input of a linear, which its gradient needs",
}

# Cases whose batch of 3 runs sites that no calibration batch reached, and why.
UNSEEN: dict[str, str] = {"branch_switches": "batch 3 takes a branch that batch 1 does not"}


def leaves(outputs: Any) -> Any:
    """A dataclass that pytree does not know, as a dict."""
    if is_dataclass(outputs) and not isinstance(outputs, dict):
        return {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    return outputs


def test_the_chosen_exist() -> None:
    assert not (KINDS | set(ONE_SIZE)) - set(ZOO)
    assert SLOW <= KINDS
    assert set(SHOWN) <= KINDS


SLOW = {
    "mobilevitv2", "funnel", "speech_to_text", "sew", "gemma2", "siglip", "whisper", "t5", "clip",
    "swinv2", "levit", "mobilenet_v1", "yolos", "convbert", "modernbert", "deberta_v2", "beit",
    "bloom", "mpt", "falcon", "vit_mae", "mixtral", "efficientnet",
}  # fmt: skip
"""Left to ``make test-long``: others of their kinds are here, decoders in ``test_decoding`` and
experts in ``test_experts``."""
TAKEN = set() if OLDEST else KINDS - SLOW  # there test_ipex_zoo has some
AWKWARD = [name for name in CASES if name not in ZOO]
CHOSEN = {
    name: case
    for name, case in CASES.items()
    if LONG or name in TAKEN or name in AWKWARD[:: 8 if OLDEST else 4]
}
"""Architectures of each kind and a quarter of the awkward models, on the oldest torch an eighth:
``tests/graph`` captures them."""


@pytest.mark.parametrize("case", CHOSEN.values(), ids=list(CHOSEN))
def test_captured_calibrated_and_quantized(case: Case) -> None:
    model = case.build()
    run(model, case.inputs(1))  # some models keep what they computed at their first call
    before = snapshot(model)
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    for inputs, again in zip(case.ones(), case.ones(), strict=True):
        outputs, expected = run(calib_model, inputs), run(model, again)
        assert type(outputs) is type(expected)
        assert sqnr(leaves(expected), leaves(outputs)) == float("inf")  # invariant 1
    batch = case.inputs(3)
    expected = run(model, case.inputs(3))
    found = {}
    for backend in BACKENDS:
        if (case.name, backend) in NOTHING:
            with pytest.raises(UnsupportedOp, match="nothing in the model can be quantized"):
                quantizer.quantize(model, backend=backend)
            continue
        quant_model = quantizer.quantize(model, backend=backend)
        outputs = run(quant_model, batch)
        assert type(outputs) is type(expected)
        shapes = [
            x.shape for x in pytree.tree_leaves(leaves(outputs)) if isinstance(x, torch.Tensor)
        ]
        wanted = [
            x.shape for x in pytree.tree_leaves(leaves(expected)) if isinstance(x, torch.Tensor)
        ]
        assert shapes == wanted
        found[backend] = sqnr(leaves(expected), leaves(outputs))
        batch = case.inputs(3)
        if Backend.get(backend).compiles:  # for batch 3 now
            again = sqnr(
                leaves(run(model, case.inputs(2))), leaves(run(quant_model, case.inputs(2)))
            )
            assert again >= 15.0  # the reference's own varies from 18 to 60 with the data
    check_amp(quantizer, model, case)
    if case.name in ZOO:
        assert quantizer.coverage(model).plan.macs == counted(case.build(), case.inputs(1)[1])
    if case.name in ZOO and same_torch:
        seen = operators_of(calib_model.captured.root)
        assert SHOWN.get(case.name, frozenset()) <= seen
        assert not seen - frozenset().union(*SHOWN.values())  # none that no run tries
    assert_unchanged(model, before)  # invariant 2
    if case.name not in EXCEPTIONS:
        floors = {
            backend: LOWER.get((case.name, backend), 20.0) - COARSER * (backend != "reference")
            for backend in found
        }
        assert all(value >= floors[backend] for backend, value in found.items()), found


def check_amp(quantizer: Quantizer, model: nn.Module, case: Case) -> None:
    """The AMP proxy gives the float output bit for bit, and every site a finite score."""
    amp_model = quantizer.amp(model)
    calls = list(zip(case.ones(), case.ones(), strict=True))[:2]
    if case.name not in UNSEEN:
        calls.append((case.inputs(3), case.inputs(3)))
    for inputs, again in calls:
        outputs, expected = run(amp_model, inputs), run(model, again)
        assert type(outputs) is type(expected)
        assert sqnr(leaves(expected), leaves(outputs)) == float("inf")
        assert not any(
            x.requires_grad for x in pytree.tree_leaves(leaves(outputs)) if isinstance(x, Tensor)
        )
    ranking = quantizer.sensitivity(amp_model)
    recorded = amp_model.recorder.sites
    assert set(recorded) <= set(ranking.names)
    if case.name in WITHOUT_GRADIENT:
        assert ranking.metric == "sqnr"
    elif (case.name, "reference") not in NOTHING:
        assert ranking.metric == "output", ranking.note
        assert all(stats.reached for stats in recorded.values()), ranking.note
    for site in ranking:
        assert math.isfinite(site.score)
        assert not math.isnan(site.local_sqnr)
