"""What every registered observer promises, whatever its statistics."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys

import pytest
import torch

from torch_quant.core.functional import fake_quantize
from torch_quant.core.granularity import Granularity, PerChannel, PerTensor, block_extremes
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig, NotCalibrated, QuantError
from torch_quant.statistics import OBSERVERS, Observer, observer_class

BATCH_DEPENDENT = {"moving_average"}  # by definition, not for want of care

SPECS = {
    str(spec): spec
    for spec in (
        QuantSpec.of(bits=bits, signed=signed, symmetric=symmetric)
        for bits, signed, symmetric in itertools.product(range(2, 9), (False, True), (False, True))
    )
}


def per_channel(spec: QuantSpec) -> QuantSpec:
    return QuantSpec.of(
        bits=spec.bits, signed=spec.signed, symmetric=spec.symmetric, per_channel=True
    )


@pytest.fixture(params=sorted(OBSERVERS))
def cls(request: pytest.FixtureRequest) -> type[Observer]:
    return OBSERVERS[request.param]


@pytest.fixture(params=[PerTensor(), PerChannel(1)], ids=["per_tensor", "per_channel"])
def blocks(request: pytest.FixtureRequest) -> Granularity:
    granularity: Granularity = request.param
    return granularity


def spec_for(blocks: Granularity, **options: object) -> QuantSpec:
    return QuantSpec.of(granularity=blocks.unbound(), **options)  # type: ignore[arg-type]


def batches(count: int = 6, rows: int = 40) -> list[torch.Tensor]:
    """Batches of ``[rows, 5, 7]`` whose ranges and channels differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1e-4, 1.0, 3.0, 100.0, 1e6])[:, None]
    return [
        torch.randn(rows, 5, 7, generator=generator) * scale * (3.0**i) + 0.1 * i
        for i in range(count)
    ]


def assert_same_state(a: Observer, b: Observer) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[key].dtype
            assert torch.equal(value, right[key]), key
        elif key != "batches":
            assert value == right[key]


def test_names_are_the_registered_ones() -> None:
    assert sorted(OBSERVERS) == ["entropy", "histogram", "minmax", "moving_average", "percentile"]
    for name, cls in OBSERVERS.items():
        assert cls.name == name
        assert observer_class(name) is cls


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(InvalidConfig, match=r"unknown observer 'nope'.*histogram.*minmax"):
        observer_class("nope")


def test_not_calibrated(cls: type[Observer], blocks: Granularity) -> None:
    observer = cls(blocks)
    with pytest.raises(NotCalibrated):
        observer.qparams(spec_for(blocks))
    with pytest.raises(NotCalibrated):
        observer.range(spec_for(blocks))


def test_granularity_must_match(cls: type[Observer], blocks: Granularity) -> None:
    observer = cls(blocks)
    observer.observe(torch.randn(3, 4))
    with pytest.raises(InvalidConfig, match="statistics"):
        observer.qparams(QuantSpec.of(per_channel=blocks == PerTensor()))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), "NaN"),
        (torch.tensor([[1.0, float("inf")]]), "Inf"),
        (torch.tensor([[1.0, -float("inf")]]), "Inf"),
        (torch.empty(0, 2), "empty"),
        (torch.ones(1, 2, dtype=torch.int64), "int64"),
        (torch.ones(1, 2, dtype=torch.bool), "bool"),
    ],
    ids=["nan", "inf", "minus_inf", "empty", "int64", "bool"],
)
def test_bad_tensors_raise_and_record_nothing(
    cls: type[Observer], blocks: Granularity, x: torch.Tensor, message: str
) -> None:
    observer, untouched = cls(blocks), cls(blocks)
    for each in (observer, untouched):
        each.observe(torch.tensor([[-1.0, 2.0], [0.5, 1.0]]))
    with pytest.raises(QuantError, match=message):
        observer.observe(x)
    assert_same_state(observer, untouched)
    assert observer.batches == 1


def test_splitting_the_data_changes_nothing(cls: type[Observer], blocks: Granularity) -> None:
    """Exact: no batch here is large enough to be sampled."""
    if cls.name in BATCH_DEPENDENT:
        pytest.skip("depends on the batches by definition")
    data = torch.cat(batches())
    whole, split, backwards = cls(blocks), cls(blocks), cls(blocks)
    whole.observe(data)
    for batch in data.split(7):
        split.observe(batch)
    for batch in reversed(data.split(11)):
        backwards.observe(batch)
    assert_same_state(whole, split)
    assert_same_state(whole, backwards)
    for spec in (spec_for(blocks), spec_for(blocks, bits=4, signed=True, symmetric=True)):
        assert torch.equal(whole.qparams(spec).scale, split.qparams(spec).scale)
        assert torch.equal(whole.qparams(spec).zero_point, backwards.qparams(spec).zero_point)


def test_memory_does_not_grow(cls: type[Observer], blocks: Granularity) -> None:
    observer = cls(blocks)
    sizes = set()
    for batch in batches(count=12):
        observer.observe(batch)
        state = observer.state_dict().values()
        sizes.add(sum(v.untyped_storage().nbytes() for v in state if isinstance(v, torch.Tensor)))
    assert len(sizes) == 1


@pytest.mark.parametrize("value", [0.0, 3.7, -3.7, 1e-30, -1e30], ids=str)
def test_constant_tensors(cls: type[Observer], blocks: Granularity, value: float) -> None:
    observer = cls(blocks)
    x = torch.full((8, 3), value)
    observer.observe(x)
    observer.observe(x)
    for spec in SPECS.values():
        qparams = observer.qparams(spec if blocks == PerTensor() else per_channel(spec))
        assert torch.isfinite(qparams.scale).all()
        assert (qparams.scale > 0).all()
        assert (qparams.zero_point >= spec.quant_min).all()
        assert (qparams.zero_point <= spec.quant_max).all()
        # Half a step, of at least the smallest scale there is.
        assert (fake_quantize(x, qparams) - x).abs().max() <= qparams.scale.max() * 0.51


def test_all_zero_channels(cls: type[Observer]) -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0.0
    observer = cls(PerChannel(1))
    observer.observe(x)
    for spec in SPECS.values():
        qparams = observer.qparams(per_channel(spec))
        assert torch.isfinite(qparams.scale).all()
        assert (qparams.scale > 0).all()
        assert (fake_quantize(x, qparams)[:, 2] == 0.0).all()


def test_more_data_after_qparams_counts(cls: type[Observer], blocks: Granularity) -> None:
    observer = cls(blocks)
    first, *rest = batches()
    observer.observe(first)
    before = observer.qparams(spec_for(blocks))
    for batch in rest:
        observer.observe(batch)
    after = observer.qparams(spec_for(blocks))
    assert not torch.equal(before.scale, after.scale)
    fresh = cls(blocks)
    for batch in [first, *rest]:
        fresh.observe(batch)
    assert torch.equal(fresh.qparams(spec_for(blocks)).scale, after.scale)


def test_state_round_trip(cls: type[Observer], blocks: Granularity) -> None:
    first, second, third, *_ = batches()
    original = cls(blocks)
    original.observe(first)
    original.observe(second)
    saved = original.state_dict()
    snapshot = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in saved.items()}
    restored = cls(blocks)
    restored.load_state_dict(saved)
    assert restored.batches == original.batches
    assert_same_state(original, restored)
    original.observe(third)
    for key, value in snapshot.items():  # what was handed out is not written to later
        same = torch.equal(saved[key], value) if torch.is_tensor(value) else saved[key] == value
        assert same, key
    restored.observe(third)
    assert_same_state(original, restored)
    spec = spec_for(blocks)
    assert torch.equal(original.qparams(spec).scale, restored.qparams(spec).scale)


def test_state_round_trip_before_any_data(cls: type[Observer], blocks: Granularity) -> None:
    restored, fresh = cls(blocks), cls(blocks)
    restored.load_state_dict(cls(blocks).state_dict())
    with pytest.raises(NotCalibrated):
        restored.qparams(spec_for(blocks))
    for observer in (restored, fresh):
        observer.observe(batches()[0])
    assert_same_state(restored, fresh)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_dtypes(cls: type[Observer], blocks: Granularity, dtype: torch.dtype) -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    observer, reference = cls(blocks), cls(blocks)
    observer.observe(x.to(dtype))  # every dtype here holds these values exactly
    reference.observe(x.float())
    assert_same_state(observer, reference)
    assert observer.qparams(spec_for(blocks)).scale.dtype == torch.float32


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs an NVIDIA GPU: pip install torch",
)
def test_gpu_gives_what_the_cpu_gives(cls: type[Observer], blocks: Granularity) -> None:
    observer, reference = cls(blocks), cls(blocks)
    for batch in batches():
        observer.observe(batch.cuda())
        reference.observe(batch)
    ours, expected = (each.qparams(spec_for(blocks)) for each in (observer, reference))
    assert ours.scale.device.type == "cuda"
    torch.testing.assert_close(ours.scale.cpu(), expected.scale)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "channels_last", "scalar"])
def test_memory_layout_does_not_matter(cls: type[Observer], layout: str) -> None:
    base = torch.randn(4, 6, 10, 8, generator=torch.Generator().manual_seed(0))
    x = {
        "transposed": base.transpose(1, 3),
        "strided": base[:, ::2, 1:9:3],
        "expanded": base[:1].expand(5, -1, -1, -1),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "scalar": base[0, 0, 0, 0],
    }[layout]
    observer, reference = cls(), cls()
    observer.observe(x)
    reference.observe(x.clone(memory_format=torch.contiguous_format))
    assert_same_state(observer, reference)


def test_vectors_have_channels_too(cls: type[Observer]) -> None:
    observer = cls(PerChannel(0))
    observer.observe(torch.tensor([-1.0, 0.0, 4.0]))
    low, high = observer.range(QuantSpec.of(bits=8, per_channel=True))
    assert low.shape == high.shape == (3,)


@pytest.mark.thin("cls", "shape")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("shape", ["two_sided", "positive", "negative", "offset", "relu", "wild"])
def test_range_is_inside_the_extremes(
    cls: type[Observer], blocks: Granularity, spec: QuantSpec, shape: str
) -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    x = {
        "two_sided": x,
        "positive": x.abs() + 0.01,
        "negative": -x.abs() - 0.01,
        "offset": x * 1e-3 + 40.0,
        "relu": x.relu(),
        "wild": x**7,
    }[shape]
    observer = cls(blocks)
    observer.observe(x)
    low, high = observer.range(spec if blocks == PerTensor() else per_channel(spec))
    smallest, largest = block_extremes(x, blocks)
    assert low.shape == high.shape == smallest.shape
    assert (low >= smallest.clamp(max=0.0)).all()
    assert (high <= largest.clamp(min=0.0)).all()
    assert (low <= high).all()


def test_huge_and_tiny_values(cls: type[Observer]) -> None:
    observer = cls()
    observer.observe(torch.tensor([-3e38, 3e38]))
    observer.observe(torch.tensor([1e-40, -1e-44]))
    assert torch.isfinite(observer.qparams(QuantSpec.of()).scale)


def test_import_leaves_torch_ao_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import torch_quant.statistics; "
        "new = {name for name in set(sys.modules) - before if name.startswith('torch')}; "
        "print([name for name in new if name.startswith(('torch.ao', 'torchao'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("parts", [[0], [3], [0, 1, 2], [5, 2]], ids=str)
def test_merging_is_observing_all(
    cls: type[Observer], blocks: Granularity, parts: list[int]
) -> None:
    """What several processes saw of the data, folded in any order, is what one would have seen."""
    data = batches()
    whole, ours, theirs = cls(blocks), cls(blocks), cls(blocks)
    for i, x in enumerate(data):
        whole.observe(x)
        (theirs if i in parts else ours).observe(x)
    untouched = cls(blocks)
    for i in sorted(parts):
        untouched.observe(data[i])
    ours.merge(theirs)
    assert ours.batches == whole.batches == len(data)
    assert_same_state(theirs, untouched)
    if cls.name in BATCH_DEPENDENT:
        assert bool((ours.range(spec_for(blocks))[1] <= whole_range(data, blocks)).all())
    else:
        assert_same_state(ours, whole)


def whole_range(data: list[torch.Tensor], blocks: Granularity) -> torch.Tensor:
    return torch.stack([block_extremes(x, blocks)[1] for x in data]).amax(0)


def test_merging_with_nothing(cls: type[Observer], blocks: Granularity) -> None:
    full, empty, again = cls(blocks), cls(blocks), cls(blocks)
    for x in batches(2):
        full.observe(x)
        again.observe(x)
    full.merge(empty)
    assert_same_state(full, again)
    empty.merge(full)
    assert_same_state(empty, again)
    assert empty.batches == 2


def test_what_differs_does_not_merge(cls: type[Observer]) -> None:
    other = next(OBSERVERS[name] for name in sorted(OBSERVERS) if OBSERVERS[name] is not cls)
    mine, theirs, channels = cls(), other(), cls(PerChannel(1))
    for each in (mine, theirs, channels):
        each.observe(torch.randn(3, 4))
    untouched = copy.deepcopy(mine)
    for wrong in (theirs, channels):
        with pytest.raises(InvalidConfig, match="merged"):
            mine.merge(wrong)
    assert_same_state(mine, untouched)
