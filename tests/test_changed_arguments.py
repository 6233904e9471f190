"""Modules that change what they are given: proxies and quantized models do so too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import normal, seeded
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant import Quantizer, sqnr


class FillsDict(nn.Module):
    """Concatenates what the caller's dictionary holds, and puts the result back."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        k = self.key(x)
        if "k" in cache:
            k = torch.cat([cache["k"], k], 1)
        cache["k"] = k
        return self.out(x + k.mean(1, keepdim=True))


class AppendsList(nn.Module):
    """Appends every layer's result to the caller's list, which it also returns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def forward(self, x: Tensor, hidden: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        for layer in self.layers:
            x = layer(x).relu()
            hidden.append(x)
        return x, hidden


class OuterCache(nn.Module):
    """In pieces, since data decide; the piece below fills the dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = FillsDict()

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        return self.inner(x, cache) if x.sum() < 1e9 else x


class Cells:
    """A cache of a class of its own, which pytree knows."""

    def __init__(self) -> None:
        self.cells: dict[str, Tensor] = {}


pytree.register_pytree_node(
    Cells,
    lambda cache: (list(cache.cells.values()), tuple(cache.cells)),
    lambda values, names: _cells(dict(zip(names, values, strict=True))),
    serialized_type_name="tests.Cells",
    flatten_with_keys_fn=lambda cache: (
        [(pytree.MappingKey(k), v) for k, v in cache.cells.items()],
        tuple(cache.cells),
    ),
)


def _cells(values: dict[str, Tensor]) -> Cells:
    cache = Cells()
    cache.cells = values
    return cache


class FillsObject(FillsDict):
    def forward(self, x: Tensor, cache: Any) -> Tensor:
        return super().forward(x, cache.cells)


class SlotCells:
    """A cache of a class without dictionaries, of which pytree knows nothing."""

    __slots__ = ("cells",)

    def __init__(self) -> None:
        self.cells: dict[str, Tensor] = {}


class ReplacesSlot(FillsDict):
    def forward(self, x: Tensor, cache: Any) -> Tensor:
        cells = dict(cache.cells)
        y = super().forward(x, cells)
        cache.cells = cells
        return y


WRITING: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Callable[[Any], Any]]] = {
    "dictionary": (FillsDict, dict, lambda c: c),
    "list": (AppendsList, list, lambda c: c),
    "in pieces": (OuterCache, dict, lambda c: c),
    "registered object": (FillsObject, Cells, lambda c: c.cells),
    "object with slots": (ReplacesSlot, SlotCells, lambda c: c.cells),
}


@pytest.mark.parametrize("name", WRITING)
def test_arguments_are_changed_as_the_model_changes_them(name: str) -> None:
    build, make, held = WRITING[name]
    model = seeded(build).eval()
    quantizer = Quantizer("reference")
    proxies = [quantizer.calib(model), None, None]
    caches, reference = [make() for _ in range(3)], [make() for _ in range(3)]
    for i in range(3):
        if i:
            proxies[i] = quantizer.amp(model) if i == 1 else quantizer.quantize(model)
        for step in range(3):
            x = normal(2, 4 - step, 16, salt=step) if name != "list" else normal(2, 16, salt=step)
            actual, expected = proxies[i](x, caches[i]), model(x, reference[i])
            if name == "list":
                assert (actual[1] is caches[i]) == (i != 1)  # AMP runs on copies
                actual, expected = actual[0], expected[0]
            assert torch.equal(actual, expected) if i < 2 else sqnr(expected, actual) > 20
        mine, theirs = (pytree.tree_leaves(held(c[i])) for c in (caches, reference))
        assert len(mine) == len(theirs)
        for one, two in zip(mine, theirs, strict=True):
            assert torch.equal(one, two) if i < 2 else sqnr(two, one) > 20
            assert not one.requires_grad
