"""torch.ao observers as ours. torch.ao says in warnings that it is going away: optional, then."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

from torch_quant.core.granularity import Granularity, PerChannel, block_extremes
from torch_quant.core.qparams import choose_qparams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig, NotCalibrated, QuantError
from torch_quant.statistics import OBSERVERS, Observer, from_ao

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ao = pytest.importorskip("torch.ao.quantization")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.ao"),
]

U8, S8 = QuantSpec.of(), QuantSpec.of(signed=True, symmetric=True)
S8_CHANNELS = QuantSpec.of(signed=True, symmetric=True, per_channel=True)


def data(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(30, 4, generator=generator) * (i + 1) for i in range(count)]


def fed(cls: type[Observer], blocks: Granularity | None = None) -> Observer:
    observer = cls(blocks)
    for batch in data():
        observer.observe(batch)
    return observer


@pytest.mark.parametrize("spec", [U8, S8, QuantSpec.of(bits=4)], ids=str)
def test_plain_extremes_serve_any_spec(spec: QuantSpec) -> None:
    qparams = fed(from_ao(ao.MinMaxObserver)).qparams(spec)
    everything = torch.cat(data())
    expected = choose_qparams(everything.min(), everything.max(), spec)
    assert torch.equal(qparams.scale, expected.scale)
    assert torch.equal(qparams.zero_point, expected.zero_point)


def test_moving_average() -> None:
    own = ao.MovingAverageMinMaxObserver(averaging_constant=0.3)
    for batch in data():
        own(batch)
    wrapped = fed(from_ao(ao.MovingAverageMinMaxObserver.with_args(averaging_constant=0.3)))
    low, high = wrapped.range(S8)
    assert torch.equal(low, own.min_val)
    assert torch.equal(high, own.max_val)


def test_per_channel() -> None:
    cls = from_ao(ao.PerChannelMinMaxObserver.with_args(qscheme=torch.per_channel_symmetric))
    qparams = fed(cls, PerChannel(1)).qparams(S8_CHANNELS)
    everything = torch.cat(data())
    expected = choose_qparams(*block_extremes(everything, PerChannel(1)), S8_CHANNELS)
    assert torch.equal(qparams.scale, expected.scale)
    assert qparams.scale.shape == (1, 4)


@pytest.mark.parametrize("dtype", [torch.quint8, torch.uint8], ids=str)
def test_own_search_gives_its_own_scale(dtype: torch.dtype) -> None:
    own = ao.HistogramObserver(dtype=dtype)
    for batch in data():
        own(batch)
    scale, zero_point = own.calculate_qparams()
    observer = fed(from_ao(functools.partial(ao.HistogramObserver, dtype=dtype)))
    qparams = observer.qparams(U8)
    assert qparams.scale.shape == ()
    assert float(qparams.scale) == float(scale)
    assert int(qparams.zero_point) == int(zero_point)
    low, high = observer.range(U8)
    assert float(high - low) == pytest.approx(255 * float(scale))


@pytest.mark.parametrize(
    ("options", "spec", "message"),
    [
        ({}, S8, "dtype=torch.quint8.*dtype=torch.qint8"),
        ({}, QuantSpec.of(symmetric=True), "per_tensor_affine.*per_tensor_symmetric"),
        ({"quant_min": 0, "quant_max": 127}, U8, "quant_max=127.*quant_max=255"),
        ({}, QuantSpec.of(bits=4), "quant_max=255.*quant_max=15"),
    ],
    ids=["dtype", "qscheme", "range", "bits"],
)
def test_own_search_for_another_format(
    options: dict[str, int], spec: QuantSpec, message: str
) -> None:
    observer = fed(from_ao(ao.HistogramObserver.with_args(**options)))
    with pytest.raises(InvalidConfig, match=message) as caught:
        observer.qparams(spec)
    assert "with_args" in str(caught.value)
    with pytest.raises(InvalidConfig):
        observer.range(spec)


def test_symmetric_zero_points_must_agree() -> None:
    options = {"quant_min": 0, "quant_max": 127, "qscheme": torch.per_tensor_symmetric}
    observer = fed(from_ao(ao.HistogramObserver.with_args(**options)))
    with pytest.raises(InvalidConfig, match=r"0 at 63.* 64"):
        observer.qparams(QuantSpec.of(bits=7, symmetric=True))


def test_a_subclass_with_its_own_arithmetic_is_asked() -> None:
    class Doubled(ao.MinMaxObserver):  # type: ignore[name-defined, misc]
        def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
            scale, zero_point = super().calculate_qparams()
            return 2.0 * scale, zero_point

    own = ao.MinMaxObserver()
    for batch in data():
        own(batch)
    qparams = fed(from_ao(Doubled)).qparams(U8)
    assert float(qparams.scale) == 2.0 * float(own.calculate_qparams()[0])


def test_torchao_like_observers_are_accepted() -> None:
    """Nothing is asked of where the class comes from, only of what it does."""

    class Fixed(torch.nn.Module):
        dtype, qscheme, quant_min, quant_max = torch.uint8, torch.per_tensor_affine, 0, 255

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.tensor([0.5]), torch.tensor([3])

    qparams = fed(from_ao(Fixed)).qparams(U8)
    assert (float(qparams.scale), int(qparams.zero_point)) == (0.5, 3)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (torch.nn.ReLU, "ReLU"),
        (lambda: 3, "int"),
        (ao.FixedQParamsObserver, "cannot call"),
        (torch.nn.ReLU(), "instance of ReLU"),
        ("minmax", "cannot call 'minmax'"),
    ],
    ids=["other_module", "no_module", "needs_arguments", "instance", "string"],
)
def test_other_things_are_refused(factory: object, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        from_ao(factory)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cls", "blocks", "fix"),
    [
        (ao.MinMaxObserver, PerChannel(0), "PerChannelMinMaxObserver"),
        (ao.PerChannelMinMaxObserver, None, "MinMaxObserver"),
    ],
    ids=["per_tensor_for_channels", "per_channel_for_tensor"],
)
def test_granularity_must_match(cls: type, blocks: Granularity | None, fix: str) -> None:
    wrapped = from_ao(cls)
    with pytest.raises(InvalidConfig, match=fix):
        wrapped(blocks)


def test_observers_without_ranges() -> None:
    observer = fed(from_ao(ao.PlaceholderObserver.with_args(dtype=torch.quint8)))
    with pytest.raises(InvalidConfig, match=r"from_ao\(PlaceholderObserver\)"):
        observer.qparams(U8)


def test_the_contract_holds() -> None:
    observer = from_ao(ao.MinMaxObserver)()
    assert isinstance(observer, Observer)
    with pytest.raises(NotCalibrated):
        observer.qparams(U8)
    with pytest.raises(QuantError, match="NaN"):
        observer.observe(torch.tensor([float("nan")]))
    observer.observe(torch.tensor([-1.0, 1.0], dtype=torch.float16))
    before = observer.qparams(U8).scale
    observer.observe(torch.tensor([-1.0, 9.0], dtype=torch.float64))
    assert observer.qparams(U8).scale > before
    assert not any("ao" in name for name in OBSERVERS)


@pytest.mark.parametrize(
    ("factory", "blocks", "spec"),
    [
        (ao.MinMaxObserver.with_args(eps=1e-6), None, U8),
        (ao.HistogramObserver, None, U8),
        (ao.PerChannelMinMaxObserver, PerChannel(1), S8_CHANNELS),
    ],
    ids=["minmax", "histogram", "per_channel"],
)
def test_state_round_trip(factory: object, blocks: Granularity | None, spec: QuantSpec) -> None:
    cls = from_ao(factory)  # type: ignore[arg-type]
    original = fed(cls, blocks)
    saved = original.state_dict()
    copies = {k: torch.as_tensor(v).clone() for k, v in saved.items()}
    restored = cls(blocks)
    restored.load_state_dict(saved)
    assert torch.equal(original.qparams(spec).scale, restored.qparams(spec).scale)
    for each in (original, restored):
        each.observe(10.0 * data()[0])
    for key, value in original.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(restored.state_dict()[key])), key
        assert torch.equal(copies[key], torch.as_tensor(saved[key])), key
