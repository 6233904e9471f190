"""Code around a layer may ask its weight for dtype and sizes: no float copy is kept for that."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import normal, seeded
from torch import Tensor, nn

import torch_quant
from torch_quant import QuantError, Quantizer, recipes
from torch_quant.nn.described import Described

needs_transformers = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("transformers") is None,
    reason="transformers is missing: pip install transformers",
)


class Casts(nn.Module):
    """Casts to the dtype of a weight, as T5 does; ``computes`` says how else it reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.computes = nn.Linear(16, 32), nn.Linear(32, 8), ""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        weight = self.second.weight
        assert isinstance(weight, Tensor)
        if weight.dtype != torch.int8:
            x = x.to(weight.dtype)
        y: Tensor = self.second(x)
        if self.computes == "with it":
            y = y + weight.sum()
        elif self.computes == "with a view":
            y = y @ weight[:, :8]
        return y


def quantized(model: nn.Module, x: Tensor, batches: int = 2, **options: Any) -> Any:
    options.setdefault("qconfig", recipes.int8_weight_only())
    quantizer = Quantizer("reference", capture="modules", **options)
    calib_model = quantizer.calib(model)
    for _ in range(batches):
        calib_model(x)
    return quantizer.quantize(model)


X = normal(4, 16)


def test_the_dtype_alone_keeps_no_float_weight() -> None:
    model = seeded(Casts).eval()
    quant_model = quantized(model, X)
    assert set(quant_model.state_dict()) == {
        f"{layer}.{name}"
        for layer in ("first", "second")
        for name in ("weight", "weight_scale", "weight_zero_point", "bias")
    }
    assert quant_model.state_dict()["second.weight"].dtype is torch.int8
    shown = quant_model.second.weight
    assert (shown.dtype, shown.shape) == (torch.float32, model.second.weight.shape)
    assert isinstance(shown, Described)
    assert torch_quant.sqnr(model(X), quant_model(X)) > 35


@pytest.mark.parametrize("how", ["with it", "with a view"])
def test_what_is_computed_with_stays_in_float(how: str) -> None:
    model = seeded(Casts).eval()
    model.computes = how
    quant_model = quantized(model, X)
    assert torch.equal(quant_model.second.weight, model.second.weight)
    assert torch_quant.sqnr(model(X), quant_model(X)) > 35


def test_computing_later_is_an_error_that_says_what_to_do() -> None:
    model = seeded(Casts).eval()
    quant_model = quantized(model, X)
    quant_model.computes = "with it"
    with pytest.raises(QuantError, match=r"aten.sum.* with second.weight.*\{'second': None\}"):
        quant_model(X)
    left = quantized(model, X, overrides={"second": None})
    left.computes = "with it"
    model.computes = "with it"
    assert torch_quant.sqnr(model(X), left(X)) > 35


def test_what_the_user_reads_from_the_proxy_stays() -> None:
    model = seeded(Casts).eval()
    quantizer = Quantizer("reference", qconfig=recipes.int8_weight_only(), capture="modules")
    calib_model = quantizer.calib(model)
    assert calib_model.first.weight is model.first.weight
    calib_model(X)
    assert torch.equal(quantizer.quantize(model).first.weight, model.first.weight)


def test_copies_pickles_files_and_moves(tmp_path: Path) -> None:
    model = seeded(Casts).eval()
    quant_model = quantized(model, X)
    expected = quant_model(X)
    torch_quant.save(quant_model, tmp_path / "model")
    for other in (
        copy.deepcopy(quant_model),
        pickle.loads(pickle.dumps(quant_model)),
        torch_quant.load(tmp_path / "model", seeded(Casts).to("meta")),
        quant_model.to(torch.float32),
    ):
        assert isinstance(other.second.weight, Described)
        assert torch.equal(other(X), expected)
    assert quant_model.to("meta").second.weight.device.type == "meta"


def test_asking_takes_no_values() -> None:
    weight = Described((4, 2), torch.float16, torch.device("cpu"), "wo.weight")
    x = torch.ones(2, 2)
    assert x.to(weight.dtype).dtype is x.to(weight).dtype is torch.float16
    with torch.inference_mode():
        assert x.to(weight).dtype is torch.float16
    assert "wo.weight" in repr(weight)
    for compute in (weight.float, weight.sum, lambda: x @ weight.T, lambda: x + weight[:2]):
        with pytest.raises(QuantError, match=r"wo\.weight.*\{'wo': None\}"):
            compute()


@needs_transformers
def test_t5_keeps_no_float_copy_of_a_quantized_weight() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = seeded(lambda: T5ForConditionalGeneration(config)).eval()
    ids = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    quantizer = Quantizer("reference", qconfig=recipes.int8_weight_only())
    calib_model = quantizer.calib(model)
    limits = {"max_new_tokens": 8, "do_sample": False}
    calib_model.generate(ids, **limits)
    quant_model = quantizer.quantize(model)
    outputs = [name for name in quant_model.state_dict() if ".wo." in name]
    assert len(outputs) == 3 * 4  # a weight, a scale and a zero point of four layers
    assert not [name for name, _ in quant_model.named_parameters() if ".wo." in name]
    assert torch.equal(quant_model.generate(ids, **limits), model.generate(ids, **limits))
