"""Packed weights: packed once for each layout, kept while somebody may use them."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable

import pytest
import torch
from flows import calibrated
from torch import Tensor, nn

from torch_quant import Backend
from torch_quant.backends.onednn.cache import PackedWeights
from torch_quant.backends.onednn.ops import PACKED
from torch_quant.convert.quantized import QuantizedModule

pytestmark = pytest.mark.skipif(
    Backend.ONEDNN.unavailable() is not None,
    reason=f"Backend.ONEDNN: {Backend.ONEDNN.unavailable()}; run on an x86 CPU",
)


def convolutions(count: int) -> QuantizedModule:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(count)])
    batches = [((torch.randn(n, 8, n + 7, 9),), {}) for n in (1, 2)]
    return calibrated(model, batches, backend="onednn").quantize(model)


@pytest.mark.parametrize("sizes", [2, 9])
def test_sizes_in_turn_are_packed_once(sizes: int) -> None:
    quant_model = convolutions(3)
    images = [torch.randn(1, 8, 8 + i, 9) for i in range(sizes)]
    first = [quant_model(x) for x in images]
    packs = PACKED.packs
    for _ in range(3):
        for x, y in zip(images, first, strict=True):
            assert torch.equal(quant_model(x), y)
    assert PACKED.packs == packs


def test_sizes_of_one_layout_share_it() -> None:
    quant_model = convolutions(1)
    before = PACKED.layouts
    for batch in range(1, 7):
        quant_model(torch.randn(batch, 8, 16, 16))
    assert PACKED.layouts <= before + 1


def weights(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(-127, 127, (256, 256), dtype=torch.int8, generator=generator)
        for _ in range(count)
    ]


def use(cache: PackedWeights, weight: Tensor, rows: int) -> Tensor:
    """``weight`` seen as so many rows, which is a layout of its own."""
    return cache.get(weight, rows, lambda: pack(weight, rows))[0]


def pack(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(weight.reshape(rows, -1), None)


SIZE = 256 * 256
"""Bytes of one of the layouts, apart from padding (some CPUs want 64 rows at once) and sums."""


def test_the_least_recently_used_layouts_go_where_memory_is_short() -> None:
    cache = PackedWeights(most_extra=int(3.5 * SIZE))
    weight = weights(1)[0]
    for rows in (64, 128, 256, 512):
        use(cache, weight, rows)
    assert cache.layouts == 4
    use(cache, weight, 64)  # so 128 has been unused for longest
    use(cache, weight, 1024)
    assert cache.layouts == 4
    packs = cache.packs
    for rows in (64, 256, 512, 1024):
        use(cache, weight, rows)
    assert cache.packs == packs
    use(cache, weight, 128)
    assert cache.packs == packs + 1


def test_each_weight_keeps_one_layout_however_short_memory_is() -> None:
    cache = PackedWeights(most_extra=0)
    several = weights(3)
    for rows in (64, 128):
        for weight in several:
            use(cache, weight, rows)
    assert cache.layouts == len(cache) == 3
    packs = cache.packs
    for weight in several:
        use(cache, weight, 128)
    assert cache.packs == packs


def test_remembered_sizes_are_bounded() -> None:
    cache = PackedWeights(most_variants=10)
    weight = weights(1)[0]
    for size in range(25):
        cache.get(weight, size, lambda: pack(weight, 32))
    assert cache.layouts == 1
    packs = cache.packs
    for size in range(20, 25):
        cache.get(weight, size, lambda: pack(weight, 32))
    assert cache.packs == packs


@pytest.mark.parametrize("variants", [1, 2])
def test_what_nobody_keeps_is_dropped(variants: int) -> None:
    cache = PackedWeights()
    kept, *gone = weights(3)
    for weight in (kept, *gone):
        for rows in (4, 8)[:variants]:
            use(cache, weight, rows)
    view = gone.pop()[:2]  # keeps the memory that it lies in
    del weight, gone
    assert len(cache) == 2
    del view
    gc.collect()
    assert len(cache) == 1
    use(cache, kept, 4)
    assert cache.packs == 3 * variants


def test_a_moved_storage_is_no_other_weight() -> None:
    cache = PackedWeights()
    weight, other = weights(2)
    address = weight.data_ptr()
    use(cache, weight, 32)
    weight.share_memory_()
    assert weight.data_ptr() != address
    # Another weight may come to lie where this one was.
    cache._weights[other.data_ptr(), other.shape] = cache._weights.pop((address, weight.shape))
    assert torch.equal(use(cache, other, 32).to_dense(), pack(other, 32).to_dense())
    assert torch.equal(use(cache, weight, 32).to_dense(), pack(weight, 32).to_dense())


@pytest.mark.parametrize("inference", [False, True])
def test_a_weight_written_in_place_is_packed_anew(inference: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(4, 8)
    quant_model = calibrated(model, [((x,), {})], backend="onednn").quantize(model)
    weights = [each for each in quant_model.buffers() if each.dtype == torch.int8 and each.dim()]
    assert len(weights) == 2
    for weight in weights:
        with torch.inference_mode(inference):
            before = quant_model(x)
            packs = PACKED.packs
            weight.neg_()
            after = quant_model(x)
            assert PACKED.packs == packs + 1
            assert not torch.equal(after, before)
            assert torch.equal(after, copy.deepcopy(quant_model)(x))


def run_in_threads(call: Callable[[int], None], count: int) -> None:
    errors: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            call(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_threads_share_it() -> None:
    cache = PackedWeights(most_extra=SIZE)
    several = weights(4)
    expected = {
        (i, rows): pack(weight, rows).to_dense()
        for i, weight in enumerate(several)
        for rows in (4, 8, 16)
    }

    def call(thread: int) -> None:
        for step in range(120):
            i, rows = (step + thread) % 4, (4, 8, 16)[(step * 7 + thread) % 3]
            assert torch.equal(use(cache, several[i], rows).to_dense(), expected[i, rows])

    run_in_threads(call, 4)
    assert 4 <= cache.layouts <= 5


def test_a_weight_is_packed_once_however_many_threads_ask() -> None:
    cache = PackedWeights()
    weight = weights(1)[0]
    run_in_threads(lambda _: [use(cache, weight, 32) for _ in range(20)] and None, 8)
    assert cache.packs == 1
