"""Zeros around an image that a convolution adds itself, and codes of zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from flows import calibrated
from models import normal, seeded
from rewriting import apply, captured
from torch import Tensor, nn

from torch_quant import Backend, sqnr
from torch_quant.passes.fold_pads import fold_pads


class Padded(nn.Module):
    """A convolution behind a padding, and what else reads that."""

    def __init__(self, pads: tuple[int, ...], dims: int = 2, **options: object) -> None:
        super().__init__()
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.first, self.second = make(3, 4, 1), make(4, 5, 3, **options)  # type: ignore[arg-type]
        self.pads = pads

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.pad(self.first(x)))  # type: ignore[no-any-return]

    def pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads)


class Twice(Padded):
    def forward(self, x: Tensor) -> Tensor:
        x = self.pad(self.first(x))
        return self.second(x) + x.mean()  # type: ignore[no-any-return]


class Value(Padded):
    def pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads, value=0.5)


class Reflected(Padded):
    def pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads, mode="reflect")


class Zeros(Padded):
    def __init__(self) -> None:
        super().__init__(())
        self.pad = nn.ZeroPad2d((1, 1, 2, 2))  # type: ignore[method-assign, assignment]


FOLDED: dict[str, Callable[[], Padded]] = {
    "both": lambda: Padded((1, 1, 1, 1)),
    "unlike dimensions": lambda: Padded((2, 2, 1, 1), stride=2),
    "one dimension": lambda: Padded((1, 1)),
    "beside a padding": lambda: Padded((1, 1, 1, 1), padding=(1, 2), dilation=2),
    "valid": lambda: Padded((1, 1, 1, 1), padding="valid"),
    "line": lambda: Padded((1, 1), 1),
    "volume": lambda: Padded((1, 1, 0, 0, 2, 2), 3),
    "another reader": lambda: Twice((1, 1, 1, 1)),
    "a module": Zeros,
    "nothing in the batch": lambda: Padded((1, 1, 1, 1, 0, 0, 0, 0)),
}
KEPT: dict[str, Callable[[], Padded]] = {
    "one side": lambda: Padded((0, 1, 0, 1), stride=2),
    "cut off": lambda: Padded((-1, -1)),
    "channels": lambda: Padded((1, 1, 1, 1, 0, 0), padding="same"),
    "a value": lambda: Value((1, 1, 1, 1)),
    "reflected": lambda: Reflected((1, 1, 1, 1)),
}


def image(model: Padded) -> Tensor:
    return normal(2, 3, *(9, 8, 7)[: model.second.weight.dim() - 2])


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name: str) -> None:
    model = seeded(FOLDED[name]).eval()
    x = image(model)
    gm = captured(model, x)
    assert apply(fold_pads, gm) == 1
    pads = [n for n in gm.graph.nodes if "pad" in str(n.target) and n.op == "call_function"]
    assert len([n for n in pads if "conv" not in str(n.target)]) == (name == "another reader")
    torch.testing.assert_close(gm(x)[0], model(x))
    assert apply(fold_pads, gm) == 0


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    model = seeded(KEPT[name]).eval()
    gm = captured(model, image(model))
    assert apply(fold_pads, gm) == 0


@pytest.mark.parametrize("name", ["both", "another reader", "one side"])
@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_quantized_at_other_sizes(name: str, backend: str) -> None:
    if (why := Backend.get(backend).unavailable()) is not None:
        pytest.skip(why)
    model = seeded((FOLDED | KEPT)[name]).eval()
    x = image(model)
    other = normal(3, 3, 12, 11)
    batches = [((each,), {}) for each in (x, other)]
    quant_model = calibrated(model, batches, backend=backend).quantize(model)
    for each in (x, other):
        assert sqnr(model(each), quant_model(each)) > 30


def test_codes_are_padded_where_a_side_has_more() -> None:
    """The zero of their grid, so that the convolution before hands on codes."""
    if (why := Backend.ONEDNN.unavailable()) is not None:
        pytest.skip(why)
    model = seeded(KEPT["one side"]).eval()
    x = image(model)
    quant_model = calibrated(model, [((x,), {})], backend="onednn").quantize(model)
    (graph,) = quant_model.quantization.graphs
    called = [str(n.target) for n in graph.body.graph.nodes if n.op == "call_function"]
    names = ["onednn_quantize", "onednn_conv", "constant_pad_nd", "onednn_conv"]
    assert [target.split(".")[1] for target in called] == names
