"""Padded batches: with a mask, only real positions count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_quant import InvalidConfig, QConfig, Quantizer, recipes
from torch_quant.amp.padding import Real, Widths
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
    for shape in ((2, 3, 4), (2, 5, 3, 4), (6, 4), (2, 3, 5, 4)):
        kept = real.kept(torch.ones(shape))
        assert kept.sum() == 3 * kept.numel() / 6, shape
    heads = real.kept(torch.ones(2, 3, 3, 4))  # as many heads as positions
    assert heads.sum((0, 1, 3)).tolist() == [24, 12, 0]
    assert real.kept(torch.ones(2, 7)).sum() == 14
    assert real.kept(torch.full((2, 3, 1), float("nan"))).isnan().sum() == 3
    flat = torch.ones(6, 4)
    assert real.kept(flat[:4], whole=flat).sum() == 12  # positions 0 to 2 of the first row, and one
    assert real.kept(torch.ones(1, 3, 4)).sum() == 8  # the first row


def test_a_matrix_is_masked_when_two_lengths_have_shown_its_width() -> None:
    widths = Widths()
    short, long = (
        Real(torch.tensor([[True] * (length - 1) + [False]]), widths) for length in (3, 5)
    )
    for _ in range(2):  # a number of classes, as far as anyone can tell
        assert short.kept(torch.ones(1, 3), "logits").sum() == 3
    assert long.kept(torch.ones(1, 5), "logits").sum() == 4
    assert short.kept(torch.ones(1, 3), "logits").sum() == 2
    assert long.kept(torch.ones(1, 3), "classes").sum() == 3
    assert short.kept(torch.ones(1, 3), "classes").sum() == 3
    assert long.kept(torch.ones(1, 5)).sum() == 5  # without a name


class Pooled(nn.Module):
    """Classes of the mean of real positions."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.out = nn.Linear(8, 16), nn.Linear(16, classes)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        real = mask[..., None].to(x)
        y: Tensor = self.out((nn.functional.gelu(self.one(x)) * real).sum(1) / real.sum(1))
        return y


def pooled(
    model: nn.Module, big: float = 1.0, **options: Any
) -> tuple[nn.Module, Quantizer, AmpModel]:
    """After one batch, whose padding is ``big``."""
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(8, 6, 8, generator=generator), torch.zeros(8, 6)
    mask[:, :2] = 1
    quantizer = Quantizer("reference", qconfig=QConfig())
    quantizer.calib(model.eval())(x, mask)
    amp_model = quantizer.amp(model, **options)
    amp_model(torch.where(mask[..., None] == 1, x, x * big), mask)
    return model, quantizer, amp_model


@pytest.mark.parametrize("metric", ["output", "sqnr"])
def test_as_many_classes_as_positions(metric: str) -> None:
    with_mask, without = (
        {each.name: each.score for each in quantizer.sensitivity(amp_model)}
        for _model, quantizer, amp_model in (
            pooled(Pooled(6), mask="mask", metric=metric),
            pooled(Pooled(6), metric=metric),
        )
    )
    assert with_mask["out"] == pytest.approx(without["out"], rel=1e-6)


class Flat(nn.Module):
    """Layers that compute on rows times positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.out = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.out(nn.functional.gelu(self.one(x.reshape(-1, 8))))
        return y.reshape(x.shape) * mask[..., None]


def test_shares_of_weight_and_activations_leave_padding_out_in_flat_tensors() -> None:
    found = []
    for big in (1.0, 20.0):
        _model, _quantizer, amp_model = pooled(Flat(), big, mask="mask", metric="sqnr")
        stats = [amp_model.recorder.sites[name] for name in ("one", "out")]
        found.append([(each.from_activation, each.from_weight, each.noise) for each in stats])
        assert min(min(each) for each in found[-1]) > 0
    assert found[0] == found[1]


def test_no_tensor_has_the_length(caplog: pytest.LogCaptureFixture) -> None:
    _model, quantizer, amp_model = pooled(Pooled(5), mask=lambda batch: torch.eye(8, 4))
    assert "no tensor had the mask's length (4)" in caplog.text
    caplog.clear()
    amp_model(torch.ones(8, 6, 8), torch.ones(8, 6))
    assert "no tensor" not in caplog.text  # once
    pooled(Pooled(5), mask="mask")
    assert "no tensor" not in caplog.text
    assert quantizer.sensitivity(amp_model)


@pytest.mark.parametrize(
    "mask",
    [torch.tensor([[0.0, -1e9]]), torch.full((1, 2), float("nan")), torch.tensor([[2, 1]])],
    ids=["additive", "nan", "two"],
)
def test_other_values_are_refused(mask: Tensor) -> None:
    model, quantizer = calibrated_encoder()
    with pytest.raises(InvalidConfig, match=r"mask\(batch\) has values other than 0 and 1"):
        quantizer.amp(model, mask=lambda batch: mask)(**padded(texts()[0]))


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
