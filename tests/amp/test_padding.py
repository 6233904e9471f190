"""Padded batches: with a mask, only real positions count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_quant import InvalidConfig, QConfig, Quantizer, recipes
from torch_quant.amp.padding import Real
from torch_quant.amp.proxy import AmpModel


class Encoder(nn.Module):
    """Two layers of attention that leave padding out, as BERT has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x: Tensor = self.embedding(input_ids)
        keys = None if attention_mask is None else attention_mask[:, None, None].bool()
        for layer in self.layers:
            x = layer(x, keys)
        return x


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.out, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        with torch.no_grad():
            self.up.bias[3] = 6.0

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        q, k, v = (
            each(x).unflatten(-1, (2, 16)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        x = self.norm(x + self.out(mixed.transpose(1, 2).flatten(2)))
        y: Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return y


LENGTHS = (5, 9, 12, 7, 3, 10)


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 50, (1, length), generator=generator) for length in LENGTHS]


def padded(text: Tensor, length: int = 16, pad: int = 0) -> dict[str, Tensor]:
    count = text.shape[1]
    ids = torch.full((1, length), pad)
    ids[:, :count] = text
    mask = torch.zeros(1, length, dtype=torch.int64)
    mask[:, :count] = 1
    return {"input_ids": ids, "attention_mask": mask}


def whole(text: Tensor) -> dict[str, Tensor]:
    return {"input_ids": text, "attention_mask": torch.ones_like(text)}


def calibrated_encoder(config: QConfig | None = None) -> tuple[nn.Module, Quantizer]:
    model = Encoder().eval()
    quantizer = Quantizer("reference", qconfig=config)
    calib_model = quantizer.calib(model)
    for text in texts():
        calib_model(**whole(text))
        calib_model(**padded(text))
    return model, quantizer


def probed(
    batches: list[dict[str, Tensor]], **options: Any
) -> tuple[nn.Module, Quantizer, AmpModel]:
    model, quantizer = calibrated_encoder()
    amp_model = quantizer.amp(model, **options)
    for batch in batches:
        assert torch.equal(amp_model(**batch), model(**batch))
    return model, quantizer, amp_model


def scores(batches: list[dict[str, Tensor]], **options: Any) -> dict[str, float]:
    _model, quantizer, amp_model = probed(batches, **options)
    return {each.name: each.score for each in quantizer.sensitivity(amp_model)}


def by_name(batch: dict[str, Tensor]) -> Tensor:
    return batch["attention_mask"]


@pytest.mark.parametrize("mask", ["attention_mask", by_name])
@pytest.mark.parametrize("metric", ["output", "sqnr"])
def test_the_ranking_is_that_of_batches_without_padding(mask: Any, metric: str) -> None:
    # Of one text: random directions are the same at its positions then.
    text = texts()[1]
    expected = scores([whole(text)], metric=metric)
    found = scores([padded(text)], metric=metric, mask=mask)
    misled = scores([padded(text)], metric=metric)
    assert [*found] == [*expected]  # worst first
    for name, score in expected.items():
        if "embedding" in name and metric == "sqnr":
            continue  # its result is looked up before positions are known to be padded
        # A few codes are others, since products of other sizes are summed up otherwise.
        assert found[name] == pytest.approx(score, rel=1e-2), name
    ratio = [misled[name] / score for name, score in expected.items()]
    assert max(ratio) > 1.2


def test_what_stands_at_padding_makes_no_difference() -> None:
    first = scores([padded(text) for text in texts()], mask="attention_mask")
    other = scores([padded(text, pad=17) for text in texts()], mask="attention_mask")
    assert first == pytest.approx(other, rel=1e-3)


def test_output_sqnr_and_what_is_measured() -> None:
    found = {}
    for name, make in (("whole", whole), ("padded", padded)):
        _model, quantizer, amp_model = probed([make(texts()[2])], mask="attention_mask")
        found[name] = quantizer.optimize(amp_model, candidates=["smooth", "split"], progress=False)
    first, second = found["whole"], found["padded"]
    assert second.chosen == first.chosen
    assert second.chosen
    assert second.predicted == pytest.approx(first.predicted, abs=0.05)
    assert second.measured == pytest.approx(first.measured, abs=0.05)


def test_a_batch_without_a_mask_is_all_real() -> None:
    model = Encoder().eval()
    quantizer = Quantizer("reference", qconfig=recipes.fast())
    quantizer.calib(model)(texts()[1])
    amp_model = quantizer.amp(model, mask="attention_mask")
    amp_model(texts()[1])
    plain = quantizer.amp(model)
    plain(texts()[1])
    first, second = (quantizer.sensitivity(each) for each in (amp_model, plain))
    assert [each.score for each in first] == [each.score for each in second]


def test_zeros_at_padding_in_every_layout() -> None:
    real = Real(torch.tensor([[True, True, False], [True, False, False]]))
    for shape, axes in (((2, 3), 0), ((2, 3, 4), 0), ((2, 5, 3, 4), 1), ((6, 4), None)):
        kept = real.kept(torch.ones(shape))
        assert kept.sum() == 3 * kept.numel() / 6, (shape, axes)
    assert real.kept(torch.ones(2, 7)).sum() == 14
    assert real.kept(torch.full((2, 3), float("nan"))).isnan().sum() == 3
    assert real.kept(torch.ones(1, 3, 4)).sum() == 8  # the first row


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("mask", r"no input of that name; expected one of input_ids, attention_mask"),
        (lambda batch: torch.ones(3), r"mask\(batch\) is .*expected a tensor \[1, length\]"),
        (lambda batch: None, r"mask\(batch\) is .*expected a tensor"),
    ],
)
def test_a_mask_that_is_none(mask: Any, message: str) -> None:
    model, quantizer = calibrated_encoder()
    with pytest.raises(InvalidConfig, match=message):
        quantizer.amp(model, mask=mask)(**padded(texts()[0]))


def test_a_number_is_no_mask() -> None:
    model, quantizer = calibrated_encoder()
    with pytest.raises(InvalidConfig, match="mask=3; expected the name of an input"):
        quantizer.amp(model, mask=3)  # type: ignore[arg-type]
