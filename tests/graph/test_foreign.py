"""Operators of other libraries run on the caller's inputs alone: they need not check indices."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from capturing import capture, executor, serve
from models import normal, seeded
from torch import Tensor, nn

from torch_quant import Backend, Quantizer
from torch_quant.errors import CaptureFailed
from torch_quant.graph.calls import flatten_call
from torch_quant.graph.foreign import ForeignOperators
from torch_quant.graph.twin import twin_of
from torch_quant.graph.widen import export_call

WRONG: list[str] = []
"""What kernels were called with and would have read out of bounds."""


def gather(features: Tensor, index: Tensor) -> Tensor:
    index = index.long()
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(features):
        WRONG.append(f"{index.tolist()} of {len(features)}")
        raise IndexError(WRONG[-1])
    return features[index]


def gather_shape(features: Tensor, index: Tensor) -> Tensor:
    return features.new_empty((*index.shape, *features.shape[1:]))


@pytest.fixture(autouse=True, scope="module")
def operators() -> Iterator[None]:
    library = torch.library.Library("foreign_test", "DEF")
    library.define("gather(Tensor features, Tensor index) -> Tensor")
    library.impl("gather", gather, "CompositeExplicitAutograd")
    torch.library.register_fake("foreign_test::gather", gather_shape, lib=library)
    library.define("swish(Tensor x) -> Tensor")
    library.impl("swish", lambda x: x * x.sigmoid(), "CompositeExplicitAutograd")
    torch.library.register_fake("foreign_test::swish", torch.empty_like, lib=library)
    yield
    library._destroy()


@pytest.fixture(autouse=True)
def in_range() -> Iterator[None]:
    WRONG.clear()
    yield
    assert not WRONG


class Boxes(nn.Module):
    """Features ``[N, C, H, W]``; boxes ``[K, 5]`` that begin with the image they are in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 + 4, 6)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        features = torch.ops.foreign_test.gather(self.stem(x), boxes[:, 0])
        return self.head(torch.cat([features.mean((2, 3)), boxes[:, 1:]], 1))


def boxes_of(images: list[int]) -> Tensor:
    corners = torch.rand(len(images), 4, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor(images)[:, None].float(), corners], 1)


@pytest.mark.parametrize("images", [[0], [0, 0, 0], [0, 1], [1, 1, 0, 1], [0, 2, 1]])
@torch.no_grad()
def test_a_capture_runs_no_foreign_operator_on_made_up_inputs(images: list[int]) -> None:
    model, count = seeded(Boxes), max(images) + 1
    x, boxes = normal(count, 3, 8, 8), boxes_of(images)
    graph = capture(model, x, boxes)
    assert torch.equal(serve(graph, x, boxes), model(x, boxes))


@torch.no_grad()
def test_calibration_and_quantization_stay_in_range() -> None:
    model = seeded(Boxes)
    quantizer = Quantizer(Backend.REFERENCE)
    proxy = quantizer.calib(model)
    calls = [[0, 1], [0], [2, 1, 0, 2], [1, 1, 1], [0, 0, 0]]
    for images in calls:
        inputs = normal(max(images) + 1, 3, 8, 8), boxes_of(images)
        assert torch.equal(proxy(*inputs), model(*inputs))
    quantized = quantizer.quantize(model)
    for images in [*calls, [0, 3, 1], [5]]:
        inputs = normal(max(images) + 1, 3, 8, 8), boxes_of(images)
        assert quantized(*inputs).shape == (len(images), 6)


class Level(nn.Module):
    """Its first call makes a table for all others, as poolers over several levels do."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None
        self.head = nn.Linear(4, 4)

    def forward(self, features: Tensor, index: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(4.0)
        rows = torch.ops.foreign_test.gather(features, index[:, -1])
        return self.head(rows + self.table * index.float().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@torch.no_grad()
def test_other_values_are_no_index_out_of_range(dtype: torch.dtype) -> None:
    model = seeded(Level)
    run, _ = executor(model)
    index = torch.tensor([[9, 7, 2], [8, 5, 0]], dtype=dtype)
    for rows in (3, 4):
        features = normal(rows, 4)
        assert torch.equal(run(features, index), model(features, index))


class Shifted(nn.Module):
    def forward(self, features: Tensor, index: Tensor, shift: int, name: str) -> Tensor:
        return torch.ops.foreign_test.gather(features, index + shift)


@torch.no_grad()
def test_other_numbers_and_masks_are_not_tried() -> None:
    inputs = normal(5, 4), torch.tensor([0, 1, 0]), 3
    call, graph = export_call(twin_of(Shifted().eval()), flatten_call((*inputs, "any"), {}))
    assert not call.numbers
    assert call.rebuild(call.tensors)[0][2] == 3
    assert not graph.exact  # zeros and ones may be a mask, but are an index here
    with pytest.raises(CaptureFailed):
        graph.contract.check(flatten_call((normal(5, 4), torch.tensor([1]), 3, "any"), {}))


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.ops.foreign_test.swish(self.first(x)))


@torch.no_grad()
def test_elementwise_operators_serve_every_size_of_two_and_more() -> None:
    model = seeded(Smooth)
    run, submodule = executor(model)
    run(normal(2, 6, 8))
    for shape in ((3, 9, 8), (8, 2, 8), (64, 5, 8)):
        assert torch.equal(run(normal(*shape)), model(normal(*shape)))
    assert len(submodule.graphs) == 1
    for shape in ((1, 9, 8), (1, 2, 8), (3, 1, 8), (5, 1, 8), (1, 1, 8)):
        assert torch.equal(run(normal(*shape)), model(normal(*shape)))
    assert len(submodule.graphs) == 4


@torch.no_grad()
def test_quantized_elementwise_operators_serve_what_was_calibrated() -> None:
    model = seeded(Smooth)
    quantizer = Quantizer(Backend.REFERENCE)
    proxy = quantizer.calib(model)
    for shape in ((1, 6, 8), (4, 6, 8)):
        assert torch.equal(proxy(normal(*shape)), model(normal(*shape)))
    quantized = quantizer.quantize(model)
    assert len(quantizer.plan.quantized) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in ((1, 6, 8), (1, 3, 8), (4, 6, 8), (2, 11, 8)):
            assert quantized(normal(*shape)).shape == (*shape[:2], 4)


@torch.no_grad()
def test_code_that_no_graph_can_hold_runs_on_the_call_alone() -> None:
    seen: list[tuple[int, ...]] = []

    class Native(nn.Module):
        def forward(self, features: Tensor, index: Tensor) -> Tensor:
            if type(features) is Tensor:
                seen.append(tuple(features.shape))
            return features[torch.from_numpy(index.numpy())]

    with pytest.raises(CaptureFailed):
        capture(Native().eval(), normal(2, 4), torch.tensor([0, 1, 1]))
    assert seen == [(2, 4)] * 2


@torch.no_grad()
def test_operators_of_other_libraries_are_noted() -> None:
    x = normal(2, 3)
    with ForeignOperators() as foreign:
        torch.ops.foreign_test.swish(x.softmax(1) @ x.T)
        torch.ops.foreign_test.gather(x, torch.tensor([0.0]))
    assert foreign.names == {"foreign_test::swish", "foreign_test::gather"}
