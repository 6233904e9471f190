"""Convolutions that oneDNN computes wrong in int8, or crashes on, come out right on every backend.

Each shape here gave other numbers, or a crash, on ONEDNN, IPEX, INDUCTOR and OPENVINO with oneDNN
3.7 and 3.11 and AVX512-VNNI.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from flows import calibrated
from models import normal, seeded
from thinning import rarely
from torch import nn

from torch_quant import sqnr
from torch_quant.backends import ReferenceBackend, available_backends
from torch_quant.backends.convolutions import right_windows
from torch_quant.backends.onednn.ops import CONV

CASES: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "one window": (lambda: nn.Conv2d(16, 16, 8, 8), [(16, 8, 8), (16, 16, 8), (16, 24, 40)]),
    "one window of a row": (lambda: nn.Conv1d(32, 16, 8, 8), [(32, 8), (32, 56)]),
    "one channel": (
        lambda: nn.Conv2d(1, 64, (3, 5), (1, 4), padding=(1, 0)), [(1, 9, 6), (1, 9, 8), (1, 9, 33)]
    ),
    "one channel, padded": (
        lambda: nn.Conv2d(1, 64, (5, 7), (1, 4), padding=(2, 1)), [(1, 7, 5), (1, 7, 9), (1, 9, 33)]
    ),
    "two results a channel": (
        lambda: nn.Conv2d(16, 32, (3, 5), (1, 4), padding=(1, 0), groups=16),
        [(16, 9, 6), (16, 9, 5), (16, 9, 33)],
    ),
    "two channels of sound": (lambda: nn.Conv1d(2, 4, 5, groups=2), [(2, 12), (2, 16)]),
    "many results a channel": (lambda: nn.Conv2d(2, 96, 3, groups=2), [(2, 3, 3), (2, 9, 9)]),
    "all padding": (
        lambda: nn.Conv2d(2, 32, 1, (1, 2), padding=(0, 3), dilation=(1, 3)), [(2, 1, 1), (2, 9, 9)]
    ),
    "all padding, in groups": (
        lambda: nn.Conv2d(
            12, 24, (7, 1), (1, 3), padding=(0, 2), dilation=(1, 3), groups=12
        ),
        [(12, 7, 1), (12, 9, 9)],
    ),
    "no depth": (lambda: nn.Conv3d(1, 8, 3, padding=1), [(1, 1, 6, 6), (1, 3, 6, 6)]),
}  # fmt: skip
FOUND = {each.name: each for each in available_backends()}
BACKENDS = [
    name if name != "inductor" else rarely(name)  # it compiles for a quarter of a minute
    for name in ("onednn", "ipex", "openvino", "inductor")
    if name in FOUND
]


@pytest.mark.parametrize("first", ["small", "large"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_all_sizes_are_right(case: str, backend: str, first: str) -> None:
    build, sizes = CASES[case]
    sizes = sizes if first == "small" else sizes[::-1]
    model = seeded(lambda: nn.Sequential(build(), nn.ReLU()))
    batches = [normal(2, *size, salt=i) for i, size in enumerate(sizes)]
    quantizer = calibrated(model, [((x,), {}) for x in batches], backend=backend)
    quant_model = quantizer.quantize(model)
    reference = quantizer.quantize(model, backend=ReferenceBackend(FOUND[backend]))
    for x in (*batches, *batches):
        assert sqnr(reference(x), quant_model(x)) > 25, x.shape


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_random_shapes_are_exact(dims: int) -> None:
    chosen = random.Random(dims)
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]

    def each(*values: int) -> list[int]:
        found = [chosen.choice(values) for _ in range(dims)]
        return found if chosen.random() < 0.5 else [found[-1]] * dims

    count = 0
    while count < 300:
        channels = chosen.choice([1, 2, 3, 8, 16, 32, 64])
        groups = chosen.choice([1, 1, channels])
        results = groups * chosen.choice([1, 2, 3, 8] if groups > 1 else [1, 4, 16, 96])
        kernel, hole = each(1, 2, 3, 4, 8), each(1, 1, 1, 2, 3)
        stride = each(1, 2, 3, 4) if chosen.random() < 0.7 else kernel
        padding = each(0, 0, 1, 2, 3)
        size = each(1, 2, 3, 4, 6, 8, 9, 14) if chosen.random() < 0.7 else kernel
        rest = [
            n + 2 * p - d * (k - 1) - 1
            for n, p, d, k in zip(size, padding, hole, kernel, strict=True)
        ]
        if min(rest) < 0:
            continue
        count += 1
        generator = torch.Generator().manual_seed(count)
        codes = torch.randint(0, 16, (2, channels, *size), generator=generator)
        weight = torch.randint(-8, 8, (results, channels // groups, *kernel), generator=generator)
        geometry = (stride, padding, hole, groups)
        found = CONV(
            codes.to(torch.uint8), 1.0, 7, weight.to(torch.int8), torch.ones(results), None,
            *geometry, 1.0, 0, torch.float32, "none", [],
        )  # fmt: skip
        expected = convolution(codes.float() - 7, weight.float(), None, *geometry)
        assert torch.equal(found, expected), (weight.shape, size, geometry)


@pytest.mark.parametrize(
    ("weight", "stride", "padding", "dilation", "groups"),
    [
        ((64, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1),
        ((128, 64, 3, 3), (2, 2), (1, 1), (1, 1), 1),
        ((32, 1, 3, 3), (2, 2), (1, 1), (1, 1), 32),
        ((192, 3, 16, 16), (16, 16), (0, 0), (1, 1), 1),
        ((21, 64, 3, 3), (1, 1), (12, 12), (12, 12), 1),
    ],
    ids=["stem", "stride 2", "depthwise", "patches", "dilated"],
)
def test_usual_convolutions_stay(
    weight: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> None:
    for sizes in ((None, None), (224, 224), (64, 33)):
        assert right_windows(sizes, weight, stride, padding, dilation, groups) is None
