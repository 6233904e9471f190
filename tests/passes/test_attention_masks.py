"""A mask of booleans becomes floats once for all attentions that read it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from models import normal, seeded
from rewriting import canonical
from torch import Tensor, nn

from torch_quant import Quantizer, recipes, sqnr
from torch_quant.passes.attention_masks import share_masks
from torch_quant.passes.base import PassContext

WIDTH = 16


class Layers(nn.Module):
    """Three attentions, one of which has a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor, other: Tensor) -> Tensor:
        for layer, seen in zip(self.layers, (mask, mask, other), strict=True):
            q, k, v = layer(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)
        return x


def masks(batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    x = normal(batch, tokens, WIDTH, salt=tokens)
    mask = normal(batch, 1, tokens, tokens, salt=1) > 0
    mask[:, :, 1] = False  # a row that sees nothing
    return x, mask, torch.ones(tokens, tokens, dtype=torch.bool).tril()


def test_shared_masks_change_nothing() -> None:
    model = seeded(Layers).eval()
    gm = canonical(model, *masks(2, 7))
    assert share_masks(PassContext(gm)) == 1
    gm.recompile()
    aten = torch.ops.aten
    (floats,) = gm.graph.find_nodes(op="call_function", target=aten.where.self)
    assert len(floats.users) == 2
    inputs = masks(2, 7)
    assert torch.equal(gm(*inputs)[0], model(*inputs))
    assert share_masks(PassContext(gm)) == 0


def test_a_whole_model_shares_them_at_other_sizes() -> None:
    model: Any = seeded(Layers).eval()
    quantizer = Quantizer("onednn", qconfig=recipes.int8_dynamic(), capture="whole")
    quant_model = quantizer.quantize(model, example_inputs=masks(2, 7))
    graph = quant_model.quantization.graphs[0].body.graph
    names = [getattr(node.target, "_opname", "") for node in graph.nodes]
    assert names.count("where") == 1
    for sizes in ((2, 7), (1, 5)):
        assert sqnr(model(*masks(*sizes)), quant_model(*masks(*sizes))) > 30
    x, *others = masks(2, 7)
    wide = copy.deepcopy(quant_model.quantization.graphs[0].body).double()(x.double(), *others)
    assert sqnr(model(x, *others), wide[0].float()) > 30
