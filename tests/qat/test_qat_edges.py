"""First and last layers keep 8 bits where the rest has fewer, in training and when deployed."""

from __future__ import annotations

import pytest
import torch
from models import normal
from qat_training import FOUR_BITS, calibrated, quiet, steps
from torch import Tensor, nn

from torch_quant import InvalidConfig, QConfig, Quantizer, recipes

pytestmark = pytest.mark.usefixtures("grad")


def bits_of(plan: object) -> dict[str, tuple[int, int]]:
    return {
        name: (site.weight.bits if site.weight else 0, site.activation.bits)
        for name, site in plan.items()  # type: ignore[attr-defined]
        if site.quantized
    }


def test_the_plan_says_so_everywhere() -> None:
    quantizer, model, inputs = calibrated("small_cnn", qconfig=FOUR_BITS)
    qat_model = quantizer.qat(model)
    wanted = {"conv": (8, 8), "block.conv1": (4, 4), "block.conv2": (4, 4), "head": (8, 8)}
    assert bits_of(qat_model.plan) == wanted
    assert "first and last layers with more bits: conv, head" in repr(qat_model)
    assert torch.equal(quiet(qat_model, inputs), quiet(quantizer.quantize(model), inputs))
    steps(quantizer, qat_model.train(), inputs)
    trained = quiet(qat_model.eval(), inputs)
    deployed = quantizer.quantize(qat_model)
    assert bits_of(deployed.plan) == wanted
    assert torch.equal(quiet(deployed, inputs), trained)
    again = Quantizer.from_config(quantizer.to_config())
    again.calib(model)(*inputs)
    assert bits_of(again.quantize(model).plan) == wanted
    assert "override 'head'" in str(quantizer.explain("head"))


def test_one_can_turn_it_off_or_say_otherwise() -> None:
    quantizer, model, _ = calibrated("small_cnn", qconfig=FOUR_BITS)
    assert set(bits_of(quantizer.qat(model, edge_bits=None).plan).values()) == {(4, 4)}
    assert "first and last" not in repr(quantizer.qat(model, edge_bits=None))
    assert bits_of(quantizer.qat(model, edge_bits=6).plan)["conv"] == (6, 6)
    quantizer, model, _ = calibrated(
        "small_cnn", qconfig=FOUR_BITS, overrides={"head": FOUR_BITS, "conv": None}
    )
    plan = quantizer.qat(model).plan
    assert bits_of(plan)["head"] == (4, 4)
    assert not plan["conv"].quantized
    for wrong in (0, 9, 8.0, True):
        with pytest.raises(InvalidConfig, match="edge_bits"):
            quantizer.qat(model, edge_bits=wrong)


def test_eight_bits_and_single_layers_are_left_alone() -> None:
    quantizer, model, _ = calibrated("small_cnn")
    quantizer.qat(model)
    assert not quantizer.overrides
    quantizer, model, _ = calibrated(nn.Linear(8, 4), normal(16, 8), qconfig=FOUR_BITS)
    assert bits_of(quantizer.qat(model).plan) == {"linear": (4, 4)}


class Branches(nn.Module):
    """Two inputs, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.image = nn.Embedding(16, 8), nn.Linear(12, 8)
        self.body, self.more = nn.Linear(8, 8), nn.Linear(8, 8)
        self.label, self.box = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(self.words(ids).mean(1) + self.image(image)).relu()
        return self.label(x), self.box(self.more(x).relu())


@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_every_first_and_every_last(backend: str) -> None:
    ids = torch.arange(32).reshape(8, 4) % 16
    config = QConfig(weight=FOUR_BITS.weight) if backend == "onednn" else FOUR_BITS
    quantizer, model, _ = calibrated(
        Branches(), ids, normal(8, 12), qconfig=config, backend=backend
    )
    plan = quantizer.qat(model).plan
    weights = {name: site.weight.bits for name, site in plan.items() if site.quantized}
    if backend == "reference":
        assert weights == {"words": 8, "image": 8, "body": 4, "more": 4, "label": 8, "box": 8}
    assert "body" not in quantizer.overrides


def test_of_models_in_pieces_the_first_and_the_last() -> None:
    config = recipes.int4_weight_only(group_size=8)
    quantizer = Quantizer("reference", qconfig=config)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    qat_model = quantizer.qat(model, example_inputs=normal(8, 16))
    assert [x.weight.bits for x in qat_model.plan.values()] == [8, 4, 4, 8]
    assert qat_model.plan["0"].weight.granularity == qat_model.plan["1"].weight.granularity
