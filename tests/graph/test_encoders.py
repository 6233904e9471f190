"""PyTorch's encoder zeroes padding on its fast path, and so does its twin."""

from __future__ import annotations

import pytest
import torch
from models import normal, seeded
from torch import Tensor, nn

from torch_quant import Quantizer, sqnr


class Pooled(nn.Module):
    """As published: an encoder over padded text, and the mean over positions."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16) if norm else None)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding).mean(1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
def test_padding_is_zero_where_pytorchs_fast_path_makes_it_so(norm: bool) -> None:
    model = seeded(lambda: Pooled(norm)).eval()
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    for batch, lengths in ((3, [7, 4, 2]), (2, [5, 7])):
        x = normal(batch, 7, 16)
        last = torch.arange(7) >= torch.tensor(lengths)[:, None]
        with torch.no_grad():
            assert torch.equal(calib_model(x, last), model(x, last))
        assert torch.equal(calib_model(x, last), model(x, last))  # with gradients, another path
    first = last.flip(1)  # padding in front has values
    with torch.no_grad():
        assert torch.equal(calib_model(x, first), model(x, first))
        quant_model = quantizer.quantize(model)
        for mask in (last, first):
            assert sqnr(model(x, mask), quant_model(x, mask)) > 20
