"""Integer products of activations against arithmetic on the same codes, by instruction set."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from torch_quant import InvalidConfig, native
from torch_quant.native import products
from torch_quant.native.products import ATTENTION, BY_ROW, MATMUL
from torch_quant.ops.attention import sdpa_probabilities

SETS = native.instruction_sets()
needs_kernels = pytest.mark.skipif(not SETS, reason=f"{native.unavailable()}")

SIZES = {
    "one of all": (1, 1, 1, 1, 1, 1, 1),
    "less than a vector": (2, 3, 3, 5, 7, 8, 8),
    "rest of a tile": (1, 2, 2, 17, 33, 32, 32),
    "odd sizes": (2, 2, 2, 9, 129, 30, 17),
    "one query, shared heads": (1, 9, 3, 1, 200, 64, 64),
    "heads that all share one": (2, 4, 1, 6, 20, 16, 16),
    "values longer than keys": (1, 2, 2, 100, 40, 33, 65),
    "more rows than a thread takes": (1, 2, 2, 70, 16, 16, 16),
}
"""Batch, heads, heads of keys, queries, keys, size of a key, size of a value."""


def integers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@dataclass
class Case:
    """One attention: tensors of codes, their grids, and what it is called with."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float = 0.1
    scales: list[float] = field(default_factory=lambda: [0.02, 0.03, 0.01, 1 / 255])
    zeros: list[int] = field(default_factory=lambda: [120, 131, 99, 0])
    most: int = 255

    def result(
        self, scale: float = 1.0, zero: int = 0, dtype: torch.dtype = torch.float32,
        tokens_first: bool = True,
    ) -> Tensor:  # fmt: skip
        return ATTENTION(  # type: ignore[no-any-return]
            self.query, self.key, self.value, self.mask, self.causal, self.scale, self.scales,
            self.zeros, self.most, scale, zero, dtype, tokens_first,
        )  # fmt: skip

    def real(self, which: str, i: int) -> Tensor:
        x: Tensor = getattr(self, which)
        if x.is_floating_point():
            x = (x.double() / self.scales[i]).round().add(self.zeros[i]).clamp(0, 255)
        return (x.double() - self.zeros[i]) * self.scales[i]

    def expected(self) -> Tensor:
        """In float64: softmax, rounded as codes, times values."""
        q, k, v = (self.real(name, i) for i, name in enumerate(("query", "key", "value")))
        mask = self.mask
        if mask is not None and mask.dtype is not torch.bool:
            mask = mask.double()
        p = sdpa_probabilities(q, k, v, mask, 0.0, self.causal, self.scale, q.dim() > 2)
        scale = self.scales[3] or p.amax(-1, keepdim=True).clamp_min(1e-30) / self.most
        p = (p / scale).round() + self.zeros[3]
        p = (p.clamp(0, self.most) - self.zeros[3]) * scale
        if v.dim() > 2 and v.shape[-3] != p.shape[-3]:
            v = v.repeat_interleave(p.shape[-3] // v.shape[-3], -3)
        return p @ v

    def check(self, least_exact: float = 0.97) -> None:
        """Scores in float32 put a probability on the other side of a border now and then.

        That is one step of it times a value. Nearly all results have none.
        """
        found, expected = self.result().double(), self.expected()
        step = self.scales[2] * 255 * (self.scales[3] or 1.0 / self.most)
        difference = (found - expected).abs()
        assert difference.max() <= 1.01 * step
        exact = difference <= 1e-5 * expected.abs().max().clamp(min=1.0)
        assert exact.double().mean() >= least_exact


def case(name: str, zero: int = 0) -> Case:
    """As a model has it: projections of [batch, tokens, heads * size], cut into heads."""
    batch, heads, shared, queries, keys, size, features = SIZES[name]
    q, k, v = (
        integers(batch, t, h * d, seed=i).view(batch, t, h, d).transpose(1, 2)
        for i, (t, h, d) in enumerate(
            ((queries, heads, size), (keys, shared, size), (keys, shared, features))
        )
    )
    made = Case(q, k, v, scale=1 / math.sqrt(size))
    made.zeros[3], made.scales[3] = zero, 1 / (255 - zero)
    return made


def signed(each: Case) -> Case:
    q, k, v = ((x.int() - 128).to(torch.int8) for x in (each.query, each.key, each.value))
    return replace(each, query=q, key=k, value=v, zeros=[-8, 3, -29, each.zeros[3]])


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("zero", [0, 128, None], ids=["", "zero point of probabilities", "by row"])
def test_sizes_and_masks(name: str, zero: int | None, instructions: str) -> None:
    plain = case(name, zero or 0)
    if zero is None:
        plain.scales[3] = BY_ROW
    batch, _, queries, _ = plain.query.shape
    keys = plain.key.shape[2]
    generator = torch.Generator().manual_seed(keys)
    seen = torch.rand(batch, 1, queries, keys, generator=generator) > 0.5
    seen[0, :, 0] = False  # a row that sees nothing
    padded = torch.where(seen[:, :, :1], 0.0, -math.inf)
    masks: dict[str, Tensor | None] = {
        "none": None,
        "bool": seen,
        "float": padded + torch.randn(batch, 1, queries, keys, generator=generator),
        "of the keys alone": padded.expand(batch, 1, queries, keys),
        "of one size for all": torch.randn(queries, 1, generator=generator),
        "half": torch.randn(keys, generator=generator).half(),
    }
    for mask in masks.values():
        replace(plain, mask=mask).check()
        signed(replace(plain, mask=mask)).check()
    replace(plain, causal=True).check()
    assert not replace(plain, mask=seen).result()[0, :, 0].any()


def test_a_row_whose_mask_is_the_lowest_number_sees_all_alike(instructions: str) -> None:
    """So it is in float: the scores vanish beside it. A mask of minus infinity gives zeros."""
    each = case("less than a vector")
    mask = torch.zeros(2, 1, 5, 7)
    mask[0, :, 2] = torch.finfo(torch.float32).min
    mask[1, :, 3] = -math.inf
    each.mask = mask
    each.scales[3] = 1 / 7  # which has the code 1
    torch.testing.assert_close(
        each.result()[0, :, 2].double(), each.real("value", 2)[0].mean(1), rtol=1e-5, atol=1e-6
    )
    assert not each.result()[1, :, 3].any()


@pytest.mark.parametrize("name", SIZES)
def test_results_as_codes_and_in_order(name: str, instructions: str) -> None:
    each = case(name)
    real = each.result()
    for dtype, zero in ((torch.uint8, 117), (torch.int8, -11)):
        info = torch.iinfo(dtype)
        for tokens_first in (False, True):
            found = each.result(0.005, zero, dtype, tokens_first)
            assert found.dtype is dtype
            assert (found.transpose(1, 2) if tokens_first else found).is_contiguous()
            codes = (real / 0.005).round().add(zero).clamp(info.min, info.max)
            assert (found - codes).abs().max() <= 1  # real was rounded to float32 before
            assert (found == codes).float().mean() > 0.98


@pytest.mark.parametrize("extreme", [0, 255], ids=["lowest", "highest"])
def test_extreme_codes_and_grids(extreme: int, instructions: str) -> None:
    q, k, v = (torch.full((1, 1, n, 96), extreme, dtype=torch.uint8) for n in (3, 700, 700))
    k[:, :, 5], v[:, :, 5] = 255 - extreme, 255 - extreme
    for zeros in ([0, 0, 0], [255, 255, 255], [0, 255, 0], [255, 0, 255]):
        for step in (1e-4, 1.0, 1e4):
            each = Case(q, k, v, scale=1.0, scales=[step, step, 0.01, 1 / 255], zeros=[*zeros, 0])
            each.check()
            replace(each, scale=-1.0).check()  # the smallest product gets the highest score
            replace(each, scale=0.0).check()


def test_few_bits_of_probabilities(instructions: str) -> None:
    each = case("rest of a tile")
    each.scales[3], each.most = 0.1, 7  # most are cut off at 0.7
    each.query = each.query.new_zeros(each.query.shape)
    each.check()


def test_floats_are_rounded_while_they_are_read(instructions: str) -> None:
    each = case("odd sizes")
    floats = [
        each.real(name, i) * 1.2 for i, name in enumerate(("query", "key", "value"))
    ]  # beyond the ends of their grids too
    rounded = [
        (x / s).float().round().add(z).clamp(0, 255).to(torch.uint8)
        for x, s, z in zip(floats, each.scales, each.zeros, strict=False)
    ]
    q, k, v = (x.float() for x in floats)
    codes = replace(each, query=rounded[0], key=rounded[1], value=rounded[2])
    found = replace(each, query=q, key=k, value=v).result()
    # float32 rounds halves now and then to the other side
    assert (found - codes.result()).abs().max() <= 2 * each.scales[2]
    assert (found == codes.result()).float().mean() > 0.5
    mixed = replace(each, query=q, key=rounded[1], value=rounded[2])
    assert (mixed.result() - codes.result()).abs().max() <= 2 * each.scales[2]


def test_ranks_strides_and_broadcasts(instructions: str) -> None:
    each = case("less than a vector")
    expected = each.result()
    q, k, v = each.query, each.key, each.value
    apart = torch.zeros(*k.shape[:-1], 2 * k.shape[-1], dtype=torch.uint8)
    apart[..., ::2] = k
    assert torch.equal(replace(each, key=apart[..., ::2]).result(), expected)
    flat = replace(each, query=q.flatten(0, 1), key=k.flatten(0, 1), value=v.flatten(0, 1))
    assert torch.equal(flat.result(), expected.flatten(0, 1))
    one = replace(each, query=q[0, 0], key=k[0, 0], value=v[0, 0])
    assert torch.equal(one.result(), expected[0, 0])
    five = replace(each, query=q[None], key=k[None], value=v[None], mask=torch.ones(5, 7) > 0)
    assert torch.equal(five.result(), expected[None])
    shared = replace(each, key=k[:1, :1].expand(2, 3, -1, -1), value=v[:1, :1].expand(2, 3, -1, -1))
    copied = replace(each, key=shared.key.contiguous(), value=shared.value.contiguous())
    assert torch.equal(shared.result(), copied.result())
    batchless = replace(each, key=k[:1], value=v[:1])
    repeated = replace(each, key=k[:1].repeat(2, 1, 1, 1), value=v[:1].repeat(2, 1, 1, 1))
    assert torch.equal(batchless.result(), repeated.result())
    one_query = replace(each, query=q[:1, :1])
    repeated = replace(each, query=q[:1, :1].repeat(2, 3, 1, 1))
    assert torch.equal(one_query.result(), repeated.result())


def test_nothing_to_compute(instructions: str) -> None:
    each = case("less than a vector")
    q, k, v = each.query, each.key, each.value
    assert replace(each, query=q[:0], key=k[:0], value=v[:0]).result().shape == (0, 3, 5, 8)
    assert replace(each, query=q[:, :, :0]).result().shape == (2, 3, 0, 8)
    none = replace(each, key=k[:, :, :0], value=v[:, :, :0])
    assert torch.equal(none.result(), torch.zeros(2, 3, 5, 8))
    assert torch.equal(none.result(0.1, 7, torch.uint8), torch.full((2, 3, 5, 8), 7).byte())
    with pytest.raises(InvalidConfig, match=r"sizes of .* do not fit together"):
        replace(each, key=k[..., :7]).result()
    x = integers(2, 3, 0, 4)
    assert MATMUL(x, integers(4, 5), [1.0, 1.0], [0, 0], 1.0, 0, torch.float32).shape == (
        2,
        3,
        0,
        5,
    )
    y = MATMUL(integers(2, 0), integers(0, 3), [1.0, 1.0], [0, 0], 1.0, 0, torch.float32)
    assert torch.equal(y, torch.zeros(2, 3))


@needs_kernels
def test_threads_give_the_same(instructions: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.randn(1, 1, 300, 400, generator=generator)
    each = Case(integers(2, 4, 300, 48), integers(2, 2, 400, 48), integers(2, 2, 400, 48), mask)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(each.result())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_more_terms_than_fit_are_summed_in_float(
    monkeypatch: pytest.MonkeyPatch, instructions: str
) -> None:
    each = case("one query, shared heads")
    whole = each.result()
    product = MATMUL(each.query, each.key.mT[:, :1], [0.1, 0.1], [3, 4], 1.0, 0, torch.float32)
    monkeypatch.setattr(products, "MOST_TERMS", 8)
    torch.testing.assert_close(each.result(), whole, rtol=1e-4, atol=each.scales[2])
    again = MATMUL(each.query, each.key.mT[:, :1], [0.1, 0.1], [3, 4], 1.0, 0, torch.float32)
    torch.testing.assert_close(again, product, rtol=1e-5, atol=1e-3)


MATRICES = {
    "one of all": ((1, 1), (1, 1)),
    "vectors": ((1, 64), (64, 5)),
    "matrices": ((33, 100), (100, 70)),
    "batches": ((4, 17, 33), (4, 33, 64)),
    "four dimensions": ((2, 3, 5, 7), (2, 3, 7, 9)),
    "one right for all": ((2, 3, 8, 16), (16, 20)),
    "one left for all": ((8, 16), (2, 3, 16, 20)),
    "both broadcast": ((3, 1, 8, 16), (1, 4, 16, 20)),
    "five dimensions": ((2, 2, 2, 3, 8), (2, 1, 2, 8, 4)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_products_of_matrices(name: str, instructions: str) -> None:
    left, right = MATRICES[name]
    x = integers(*left)
    for y in (integers(*right), integers(*right[:-2], right[-1], right[-2]).mT):
        for kind, zeros in ((torch.uint8, [3, 200]), (torch.int8, [-100, 77])):
            a, b = ((t.int() - (128 if kind is torch.int8 else 0)).to(kind) for t in (x, y))
            real = ((a.double() - zeros[0]) * 0.1) @ ((b.double() - zeros[1]) * 0.2)
            found = MATMUL(a, b, [0.1, 0.2], zeros, 1.0, 0, torch.float32)
            torch.testing.assert_close(found.double(), real, rtol=1e-6, atol=1e-5)
            codes = MATMUL(a, b, [0.1, 0.2], zeros, 50.0, 100, torch.uint8)
            expected = (real / 50).round().add(100).clamp(0, 255)
            assert (codes - expected).abs().max() <= 1  # float32 rounds before


WITHOUT = """
import torch
from test_product_kernels import MATRICES, SIZES, case, integers
from torch_quant import native
from torch_quant.native.products import MATMUL
assert native.unavailable()
for name in SIZES:
    case(name).check()
    case(name, 128).check()
x, y = integers(5, 7), integers(7, 3)
found = MATMUL(x, y, [0.1, 0.1], [1, 2], 1.0, 0, torch.float32)
torch.testing.assert_close(found, (x.float() - 1) @ (y.float() - 2) * 0.01)
"""
"""For ``test_library``."""
