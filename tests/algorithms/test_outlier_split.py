"""Outlier channels split: what is copied, what it gains, and that it holds wherever a plan goes."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import BACKENDS, Inputs, calibrated, equal, run
from onnx_files import check_fused, needs
from torch import Tensor, nn
from torch.nn import functional

import torch_quant
from torch_quant import (
    FLOAT,
    GPTQ,
    BiasCorrection,
    InvalidConfig,
    NotCalibrated,
    OutlierSplit,
    QConfig,
    Quantizer,
    QuantSpec,
    SmoothQuant,
    Transform,
    recipes,
    sqnr,
)
from torch_quant.algorithms.outlier_split import copies_of

SPLIT = QConfig(transforms=[OutlierSplit(0.1)])


class Outliers(nn.Module):
    """Behind the GELU of a block, one channel is twenty times larger than the rest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 16)
        with torch.no_grad():
            self.up.bias[5] = 20.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y: Tensor = self.head(x + self.down(functional.gelu(self.up(x))))
        return y


def wide() -> Outliers:
    """One of 512 channels behind the GELU has twelve times the spread of the rest."""
    model = Outliers().eval()
    model.up, model.down = nn.Linear(32, 512), nn.Linear(512, 32)
    with torch.no_grad():
        model.up.weight[5] *= 12
    return model


def data(count: int, seed: int = 0) -> Inputs:
    return (torch.randn(count, 5, 32, generator=torch.Generator().manual_seed(seed)),), {}


def split(
    backend: str = "reference", config: QConfig | None = SPLIT, model: nn.Module | None = None
) -> tuple[nn.Module, Quantizer]:
    """A calibrated quantizer whose ``down`` is split, or has another configuration."""
    model = model or Outliers().eval()
    overrides: dict[str, QConfig | None] = {"down": config or QConfig()}
    if hasattr(model, "head"):
        overrides["head"] = None  # so that little noise is added behind it
    return model, calibrated(
        model, [data(32)], backend=backend, qconfig=QConfig(), overrides=overrides
    )


def sites_of(quant_model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(x.shape)
        for name, x in quant_model.state_dict().items()
        if x.dtype == torch.int8
    }


def test_copies_go_where_the_largest_share_is() -> None:
    torch.manual_seed(0)
    reach = torch.rand(40) + 0.1
    reach[[3, 11]] = torch.tensor([12.0, 5.0])
    copies = copies_of(reach, 8)
    assert int(copies.sum()) == 48
    end = float((reach / copies).max())
    for channel in range(40):  # no copy can be moved to make the largest share smaller
        if copies[channel] > 1:
            assert float(reach[channel] / (copies[channel] - 1)) > end


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_outlier_behind_gelu_gains(backend: str) -> None:
    found = {}
    for name, config in (("split", SPLIT), ("plain", None)):
        model, quantizer = split(backend, config)
        expected = model(*data(64, 1)[0])
        found[name] = sqnr(expected, quantizer.quantize(model)(*data(64, 1)[0]))
    assert found["split"] >= found["plain"] + 3, found


def test_the_layer_before_computes_the_copies() -> None:
    model, quantizer = split()
    quant_model = quantizer.quantize(model)
    sizes = sites_of(quant_model)
    assert sizes["up.weight"] == (72, 32)  # a tenth of 64 in blocks of eight
    assert sizes["down.weight"] == (32, 72)
    (graph,) = quant_model.graphs
    assert "index_select" not in str(graph.body.graph)
    # Copies are exact: they are rows of one weight and one bias.
    codes, part = quant_model.state_dict()["up.weight"], quant_model.get_buffer("down.split_part")
    assert bool((codes[64:] == codes[5]).all())
    assert part[5] == part[64] == 1 / 9
    assert part[4] == 1.0


def test_in_float_nothing_but_rounding_changes() -> None:
    model, quantizer = split()
    fine = QuantSpec.of(bits=16, signed=False)
    weight = QuantSpec.of(bits=16, signed=True, symmetric=True, per_channel=True)
    quantizer.overrides = {"re:.*": QConfig(fine, weight, transforms=[OutlierSplit(0.1)])}
    quantizer.calib(model)(*data(8)[0])
    with pytest.raises(NotCalibrated, match="recorded"):  # the other layers' channels were not
        quantizer.quantize(model)
    quantizer.overrides = {"down": QConfig(fine, weight, transforms=[OutlierSplit(0.1)])}
    quantizer.overrides |= {"up": QConfig(fine, weight), "head": QConfig(fine, weight)}
    x = data(32)[0]
    assert sqnr(model(*x), quantizer.quantize(model)(*x)) > 70


@pytest.mark.parametrize("gated", [True, False])
def test_functions_of_several_tensors(gated: bool) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.gate, self.up = nn.Linear(32, 64, bias=False), nn.Linear(32, 64)
            self.down = nn.Linear(64, 32)
            self.register_buffer("factor", torch.rand(64) + 0.5)
            with torch.no_grad():
                self.up.bias[7] = 30.0

        def forward(self, x: Tensor) -> Tensor:
            mixed = functional.silu(self.gate(x)) * self.up(x) * self.factor + 0.5
            if not gated:  # a norm sees all channels at once
                mixed = functional.layer_norm(mixed, (64,))
            y: Tensor = self.down(mixed)
            return y

    found = {}
    for name, config in (("split", SPLIT), ("plain", None)):
        model, quantizer = split("reference", config, Mixed().eval())
        quant_model = quantizer.quantize(model)
        found[name] = sqnr(model(*data(64, 1)[0]), quant_model(*data(64, 1)[0]))
        if name == "split":
            (graph,) = quant_model.graphs
            assert ("index_select" in str(graph.body.graph)) is not gated
            assert sites_of(quant_model)["up.weight"] == ((72, 32) if gated else (64, 32))
    assert found["split"] > (found["plain"] + 2 if gated else 25), found


def test_a_tensor_that_others_read_is_copied_behind_it() -> None:
    class Both(Outliers):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            y = functional.gelu(self.up(x))
            out: Tensor = self.head(x + self.down(y)) + y.mean(-1, keepdim=True)
            return out

    model, quantizer = split("reference", SPLIT, Both().eval())
    quant_model = quantizer.quantize(model)
    assert sites_of(quant_model)["up.weight"] == (64, 32)
    assert sqnr(model(*data(8, 1)[0]), quant_model(*data(8, 1)[0])) > 30


def test_layers_in_a_row() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 8)
    ).eval()
    with torch.no_grad():
        model[0].bias[3], model[2].bias[5] = 20.0, 30.0
    config = QConfig(transforms=[OutlierSplit(0.1), BiasCorrection()], method=GPTQ())
    overrides = {"2": config, "4": config}
    found = {}
    for name, each in (("split", overrides), ("plain", {})):
        quantizer = calibrated(
            model, [data(32)], backend="reference", qconfig=QConfig(), overrides=each
        )
        quant_model = quantizer.quantize(model)
        found[name] = sqnr(model(*data(64, 1)[0]), quant_model(*data(64, 1)[0]))
    assert found["split"] > found["plain"] + 3, found
    quant_model = quantizer.quantize(model)
    quantizer = calibrated(
        model, [data(32)], backend="reference", qconfig=QConfig(), overrides=overrides
    )
    assert sites_of(quantizer.quantize(model)) == {
        "0.weight": (56, 32),
        "2.weight": (56, 56),
        "4.weight": (8, 56),
    }


def test_after_smoothing_it_splits_what_is_left() -> None:
    found = []
    for transforms in ([SmoothQuant(0.3)], [SmoothQuant(0.3), OutlierSplit(0.1)]):
        model, quantizer = split("reference", QConfig(transforms=transforms, method=GPTQ()))
        x = data(64, 1)[0]
        found.append(sqnr(model(*x), quantizer.quantize(model)(*x)))
    assert found[1] > found[0] + 1, found
    quantizer.overrides = {"down": QConfig(transforms=[OutlierSplit(0.1), SmoothQuant(0.3)])}
    with pytest.raises(InvalidConfig, match="down: SmoothQuant knows no channels"):
        quantizer.quantize(model)


def test_the_layer_before_in_float_computes_as_it_did() -> None:
    model, quantizer = split()
    quantizer.overrides = {**quantizer.overrides, "up": None}
    quant_model = quantizer.quantize(model)
    assert torch.equal(quant_model.state_dict()["up.weight"], model.get_parameter("up.weight"))
    assert sqnr(model(*data(8, 1)[0]), quant_model(*data(8, 1)[0])) > 30


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_and_summary_keep_it(backend: str, tmp_path: Path) -> None:
    model, quantizer = split(backend)
    inputs = data(3, 2)[0]
    expected = quantizer.quantize(model)(*inputs)
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    other = Quantizer(backend, qconfig=QConfig(), overrides=quantizer.overrides)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.quantize(model, example_inputs=inputs)(*inputs), expected)
    quantizer.save(tmp_path / "ranges")
    third = Quantizer.load(tmp_path / "ranges")
    assert torch.equal(third.quantize(model, example_inputs=inputs)(*inputs), expected)
    data_ = json.loads(json.dumps(quantizer.to_config()))
    assert Quantizer.from_config(data_).overrides == quantizer.overrides


def test_a_small_layer_gets_few_copies() -> None:
    model, quantizer = split("reference", QConfig(transforms=[OutlierSplit()]))
    assert sites_of(quantizer.quantize(model))["down.weight"] == (32, 65)


def test_a_saved_model_computes_the_same(tmp_path: Path) -> None:
    model, quantizer = split("onednn")
    x = data(4, 3)[0]
    quant_model = quantizer.quantize(model)
    torch_quant.save(quant_model, tmp_path / "model")
    loaded = torch_quant.load(tmp_path / "model", model=Outliers().eval())
    assert torch.equal(loaded(*x), quant_model(*x))
    other = Outliers().eval()
    other.up = nn.Linear(32, 63)
    with pytest.raises(InvalidConfig, match=r"up.weight is \(63, 32\); expected \(72, 32\)"):
        torch_quant.load(tmp_path / "model", model=other)


def test_other_sizes_of_inputs_and_ranks() -> None:
    model, quantizer = split("onednn")
    quant_model = quantizer.quantize(model)
    for x in (torch.randn(1, 32), torch.randn(2, 3, 7, 32), torch.randn(9, 1, 32)):
        assert sqnr(model(x), quant_model(x)) > 20


def test_amp_ranks_it_and_comparing_follows_it() -> None:
    model, quantizer = split()
    amp_model = quantizer.amp(model)
    assert equal(run(amp_model, data(16)), run(model, data(16)))
    assert {each.name for each in quantizer.sensitivity(amp_model)} == {"up", "down"}
    found = quantizer.compare(model, [data(4)[0]])
    assert [each.site for each in found.layers] == ["up", "down", "head"]
    assert all(25 < each.after < 80 for each in found.layers)
    quantizer.fallback(amp_model, num=2)
    assert equal(quantizer.quantize(model)(*data(4)[0]), model(*data(4)[0]))


@needs("onnx", "onnxscript", "onnxruntime")
def test_onnx_file(tmp_path: Path) -> None:
    model, quantizer = split("onnx")
    check_fused(quantizer, model, data(4), data(64, 1), tmp_path / "model.onnx")


def test_training_begins_with_it_and_deploys_it() -> None:
    model = Outliers().eval()
    model.norm = nn.Identity()  # type: ignore[assignment]
    quantizer = split("reference", SPLIT, model)[1]
    x = data(8)[0]
    qat_model = quantizer.qat(model)
    start = quantizer.quantize(model)(*x)
    assert torch.equal(qat_model(*x), start)
    with torch.enable_grad():
        optimizer = torch.optim.SGD(qat_model.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            qat_model(*x).square().mean().backward()
            optimizer.step()
    deployed = quantizer.quantize(qat_model)
    assert sites_of(deployed)["up.weight"] == (72, 32)
    assert torch.equal(deployed(*x), qat_model.eval()(*x))
    assert not torch.equal(deployed(*x), start)


def test_round_weights_refuses_it() -> None:
    model, quantizer = split("reference", QConfig(transforms=[OutlierSplit()], method=GPTQ()))
    with pytest.raises(InvalidConfig, match=r"down: outlier_split.*changes the weight"):
        quantizer.round_weights(model, [data(4)[0]])


def test_asked_for_after_calibration() -> None:
    model, quantizer = split("reference", None)
    quantizer.overrides = {"down": SPLIT}
    with pytest.raises(NotCalibrated, match=r"channels of .*gelu.* were not recorded"):
        quantizer.quantize(model)


def transforms_of(quantizer: Quantizer, model: nn.Module) -> dict[str, tuple[Transform, ...]]:
    quantizer.quantize(model)
    return {
        name: tuple(each for each in site.transforms if each.changes_input)
        for name, site in quantizer.plan.items()
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_splits_where_that_gains_most(backend: str) -> None:
    found = {}
    x = data(64, 1)[0]
    for name, config in (("default", None), ("fast", recipes.fast())):
        model = wide()
        quantizer = calibrated(
            model, [data(32)], backend=backend, qconfig=config, overrides={"head": None}
        )
        found[name] = sqnr(model(*x), quantizer.quantize(model)(*x))
        if name == "default":
            assert transforms_of(quantizer, model)["down"] == (OutlierSplit(),)
    assert found["default"] >= found["fast"] + 1, found


def test_the_larger_gain_decides_in_either_order() -> None:
    # The outlier's column is small: smoothing costs the weight nothing, and cuts all channels.
    model = Outliers().eval()
    with torch.no_grad():
        model.up.bias.copy_(torch.linspace(0.0, 20.0, 64))
        model.down.weight.div_(torch.linspace(0.0, 20.0, 64) + 1)
    either = [SmoothQuant(0.8, min_gain=1.1), OutlierSplit(min_gain=1.1)]
    for transforms in (either, either[::-1]):
        quantizer = calibrated(
            model, [data(32)], backend="reference", qconfig=QConfig(transforms=transforms)
        )
        assert transforms_of(quantizer, model)["down"] == (SmoothQuant(0.8),)


def test_where_no_layer_can_compute_copies_it_is_left_out() -> None:
    model = wide()
    with torch.no_grad():
        model.norm.weight[3] = 50.0  # what `up` reads is what a norm gives
    config = QConfig(transforms=[OutlierSplit(min_gain=1.1)])
    quantizer = calibrated(model, [data(32)], backend="reference", qconfig=config)
    assert transforms_of(quantizer, model) == {"up": (), "down": (OutlierSplit(),), "head": ()}
    told = str(quantizer.explain("up"))
    assert "linear layers before compute the copies" in told
    plain = calibrated(model, [data(32)], backend="reference", qconfig=QConfig())
    plain.qconfig = config  # channels were not recorded
    assert transforms_of(plain, model)["down"] == ()


def test_the_predicted_gain_is_the_measured_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.LeakyReLU(0.99), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        model[0].weight[5] *= 12
    noise, x = {}, data(256, 1)[0]
    config = QConfig(weight=FLOAT)
    for name, transforms in (("plain", []), ("split", [OutlierSplit(0.1)])):
        two = QConfig(weight=FLOAT, transforms=transforms)
        quantizer = calibrated(
            model,
            [data(1024)],
            backend="reference",
            qconfig=config,
            overrides={"0": None, "2": two},
        )
        noise[name] = float((model(*x) - quantizer.quantize(model)(*x)).square().mean())
    split = OutlierSplit(0.1, min_gain=1.1)
    quantizer = calibrated(
        model,
        [data(1024)],
        backend="reference",
        qconfig=config,
        overrides={"2": QConfig(weight=FLOAT, transforms=[split])},
    )
    asked: list[float] = []
    gains = OutlierSplit.gains

    def noted(self: OutlierSplit, *args: Any) -> Any:
        asked.extend((found := gains(self, *args)).values())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutlierSplit, "gains", noted)
        quantizer.quantize(model)
    assert asked[0] == pytest.approx(noise["plain"] / noise["split"], rel=0.15)


@pytest.mark.parametrize("gain", [-1.0, math.inf, True, "1"])
def test_a_wrong_gain(gain: object) -> None:
    with pytest.raises(InvalidConfig, match=r"OutlierSplit\(min_gain=.*expected a factor"):
        OutlierSplit(min_gain=gain)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0, -0.5, 1.5, True, "1"])
def test_a_wrong_share(share: object) -> None:
    with pytest.raises(InvalidConfig, match=r"share=.*expected a number above 0, and 1 at most"):
        OutlierSplit(share)  # type: ignore[arg-type]
