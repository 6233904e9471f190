from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import normal
from rewriting import Compute, canonical
from torch import Tensor, fx

from torch_quant.ops.attention import decompose_attention, sdpa_probabilities
from torch_quant.passes.base import PassContext, run_passes

aten = torch.ops.aten

ROWS, KEYS, WIDTH = 5, 7, 8


def queries(*lead: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q of 5 rows, K and V of 7, behind the dimensions ``lead``."""
    return tuple(normal(*lead, rows, WIDTH, salt=i) for i, rows in enumerate((ROWS, KEYS, KEYS)))


def some_hidden(*lead: int) -> Tensor:
    mask = normal(*lead, ROWS, KEYS, salt=9) > -0.5
    mask[..., 0] = True
    return mask


FULLY_MASKED = torch.arange(ROWS)[:, None] != 2
"""Row 2 sees nothing."""

CASES: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "no mask": (queries(2, 3), {}),
    "one batch dimension": (queries(2), {}),
    "scale": (queries(2, 3), {"scale": 0.25}),
    "scale of zero": (queries(2, 3), {"scale": 0.0}),
    "causal": (queries(2, 3), {"is_causal": True}),
    "causal, scaled": (queries(2, 3), {"is_causal": True, "scale": 0.5}),
    "bool mask": ((*queries(2, 3), some_hidden(2, 3)), {}),
    "bool mask for all heads": ((*queries(2, 3), some_hidden(2, 1)), {}),
    "bool mask without a batch": ((*queries(2, 3), some_hidden()), {}),
    "fully masked row": ((*queries(2, 3), FULLY_MASKED.expand(ROWS, KEYS).clone()), {}),
    "float mask": ((*queries(2, 3), normal(2, 3, ROWS, KEYS, salt=5)), {}),
    "float mask with minus infinity": (
        (*queries(2, 3), torch.zeros(2, 1, ROWS, KEYS).masked_fill(~some_hidden(2, 1), -math.inf)),
        {},
    ),
    "float mask, row of minus infinity": (
        (*queries(2, 3), torch.zeros(ROWS, KEYS).masked_fill(~FULLY_MASKED, -math.inf)),
        {"scale": 0.25},
    ),
    "grouped queries": (
        (normal(2, 6, ROWS, WIDTH), *(normal(2, 3, KEYS, WIDTH, salt=i) for i in (1, 2))),
        {"enable_gqa": True},
    ),
    "grouped queries, causal": (
        (normal(2, 6, ROWS, WIDTH), *(normal(2, 2, KEYS, WIDTH, salt=i) for i in (1, 2))),
        {"enable_gqa": True, "is_causal": True},
    ),
    "grouped keys, a value for each query": (
        (
            normal(2, 6, ROWS, WIDTH),
            normal(2, 3, KEYS, WIDTH, salt=1),
            normal(2, 6, KEYS, WIDTH, salt=2),
        ),
        {"enable_gqa": True},
    ),
    "values of another width": (
        (
            normal(2, 3, ROWS, WIDTH),
            normal(2, 3, KEYS, WIDTH, salt=1),
            normal(2, 3, KEYS, 4, salt=2),
        ),
        {},
    ),
}


def attend(inputs: tuple[Tensor, ...], options: dict[str, Any]) -> Tensor:
    return F.scaled_dot_product_attention(*inputs[:3], *inputs[3:4], **options)


def decomposed(name: str) -> tuple[fx.GraphModule, fx.Node, fx.Node]:
    inputs, options = CASES[name]
    gm = canonical(Compute(lambda *tensors: attend(tensors, options)), *inputs)
    (node,) = gm.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    first, second = decompose_attention(node)
    run_passes(PassContext(gm), [])
    return gm, first, second


@pytest.mark.sparse
@pytest.mark.parametrize("name", CASES)
def test_gives_what_the_fused_operator_gives(name: str) -> None:
    """The fused kernel sums blocks in another order: some roundings of values around 1."""
    inputs, options = CASES[name]
    gm, first, second = decomposed(name)
    torch.testing.assert_close(gm(*inputs)[0], attend(inputs, options), rtol=1e-5, atol=1e-5)
    assert first.target is second.target is aten.matmul.default
    assert not gm.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )


@pytest.mark.sparse
@pytest.mark.parametrize("name", CASES)
def test_the_left_operand_is_what_calibration_sees(name: str) -> None:
    """A range taken of one must fit the other; both are softmax of the same scores."""
    inputs, options = CASES[name]
    gm, _, second = decomposed(name)
    output = next(iter(reversed(gm.graph.nodes)))
    output.args = ((second.args[0],),)
    gm.recompile()
    mask = {"attn_mask": inputs[3]} if len(inputs) > 3 else {}
    expected = sdpa_probabilities(*inputs[:3], **mask, **options)
    torch.testing.assert_close(gm(*inputs)[0], expected, rtol=1e-5, atol=1e-6)
    assert float(expected.min()) >= 0.0
    assert float(expected.max()) <= 1.0 + 1e-6


@pytest.mark.parametrize("name", ["fully masked row", "float mask, row of minus infinity"])
def test_a_row_that_sees_nothing_gives_zeros(name: str) -> None:
    inputs, _ = CASES[name]
    result = decomposed(name)[0](*inputs)[0]
    assert torch.equal(result[..., 2, :], torch.zeros_like(result[..., 2, :]))
    assert not result.isnan().any()


def test_other_batches_and_lengths() -> None:
    gm, _, _ = decomposed("bool mask for all heads")
    q, k, v = (normal(3, 3, rows, WIDTH, salt=i) for i, rows in enumerate((9, 4, 4)))
    mask = torch.ones(3, 1, 9, 4, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(gm(q, k, v, mask)[0], expected, rtol=1e-5, atol=1e-5)


def test_keyword_arguments() -> None:
    def compute(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query=q, key=k, value=v, attn_mask=mask, dropout_p=0.0
        )

    inputs, _ = CASES["float mask"]
    gm = canonical(Compute(compute), *inputs)
    (node,) = gm.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    decompose_attention(node)
    run_passes(PassContext(gm), [])
    torch.testing.assert_close(gm(*inputs)[0], compute(*inputs), rtol=1e-5, atol=1e-5)


def test_two_attentions_get_keys_of_their_own() -> None:
    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        once = F.scaled_dot_product_attention(q, k, v)
        return F.scaled_dot_product_attention(once, k, v, is_causal=True)

    inputs = queries(2, 3)
    gm = canonical(Compute(compute), *inputs)
    found = gm.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    keys = [node.meta["torch_quant_key"] for node in found]
    made = [decompose_attention(node) for node in found]
    run_passes(PassContext(gm), [])
    assert [second.meta["torch_quant_key"] for _, second in made] == keys
    assert len({node.meta["torch_quant_key"] for pair in made for node in pair}) == 4
    torch.testing.assert_close(gm(*inputs)[0], compute(*inputs), rtol=1e-5, atol=1e-5)
