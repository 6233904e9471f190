"""Models as short programs: written line by line, run as they are written, printed as they run."""

from __future__ import annotations

import linecache
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SIZES", "Builder", "Program", "Shape"]

Shape = tuple[int | None, ...]
"""Sizes of a value; None where it depends on the batch."""

SIZES = (3, 5)
"""Batches that programs are run on while they are written. What differs depends on the batch."""
_MOST = 6000
"""Numbers of one value."""
_NUMBERS = count()
T = TypeVar("T")


@dataclass(frozen=True)
class Program:
    """A model and its inputs, as text.

    Args:
        inputs: what makes each input of a batch of ``n``.
        layers: what makes each layer, ``self.m0`` and so on.
        lines: the steps of ``forward``.
        result: what it returns.
        batches: sizes that it is calibrated with, in order.
    """

    inputs: tuple[str, ...]
    layers: tuple[str, ...]
    lines: tuple[str, ...]
    result: str
    batches: tuple[int, int] = SIZES

    @property
    def source(self) -> str:
        names = ", ".join(f"x{i}" for i in range(len(self.inputs)))
        layers = [f"        self.m{i} = {each}" for i, each in enumerate(self.layers)]
        return "\n".join(
            [
                "import torch",
                "import torch.nn.functional as F",
                "from torch import nn",
                "",
                "class Model(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *layers,
                "",
                f"    def forward(self, {names}):",
                *(f"        {line}" for line in self.lines),
                f"        return {self.result}",
                "",
                "def inputs(n):",
                f"    return ({', '.join(self.inputs)},)",
                "",
                f"# calibrated with {self.batches[0]}, then {self.batches[1]} rows",
                "",
            ]
        )

    def __repr__(self) -> str:
        return f"\n{self.source}"

    def build(self) -> tuple[nn.Module, Callable[[int, int], tuple[Tensor, ...]]]:
        """The model, and what makes inputs of a batch size by a salt."""
        name, space = f"<program {next(_NUMBERS)}>", {"__name__": __name__}
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        exec(compile(self.source, name, "exec"), space)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = stirred(space["Model"]()).eval().requires_grad_(False)  # type: ignore[operator]
        make: Any = space["inputs"]

        def inputs(batch: int, salt: int) -> tuple[Tensor, ...]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(salt)
                return tuple(make(batch))

        return model, inputs


def stirred(model: nn.Module) -> nn.Module:
    """Its statistics and factors are no longer 0 and 1, as if it were trained."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            for each in module.parameters():
                each.add_(torch.randn_like(each), alpha=0.2)
    return model


class Builder:
    """Writes a program. A line that PyTorch refuses is left out.

    Args:
        draw: hypothesis's choice from a strategy.
        shapes: sizes of the inputs without the batch.
        indices: how many rows the table of one more input, of indices, has; 0 for no such input.
    """

    def __init__(
        self, draw: Callable[[Any], Any], shapes: Sequence[tuple[int, ...]], indices: int
    ) -> None:
        self._draw, self._module = draw, nn.Module()
        self.layers: list[str] = []
        self.lines: list[str] = []
        self.values: dict[str, Shape] = {}
        self.read: set[str] = set()
        self.inputs = [f"torch.randn({', '.join(map(str, ('n', *each)))})" for each in shapes]
        self.tables: dict[str, int] = {}
        self._spaces = [{"torch": torch, "F": F, "nn": nn, "self": self._module} for _ in SIZES]
        for i, each in enumerate(shapes):
            for batch, space in zip(SIZES, self._spaces, strict=True):
                space[f"x{i}"] = torch.randn(batch, *each)
            self.values[f"x{i}"] = (None, *each)
        if indices:
            name = f"x{len(shapes)}"
            self.inputs.append(f"torch.randint({indices}, (n, 4))")
            self.tables[name] = indices
            for batch, space in zip(SIZES, self._spaces, strict=True):
                space[name] = torch.randint(indices, (batch, 4))
        self.given = (*self.values, *self.tables)

    # Choices

    def of(self, *values: T) -> T:
        """One of these; the first is the simplest."""
        return self._draw(st.sampled_from(values))  # type: ignore[no-any-return]

    def number(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))  # type: ignore[no-any-return]

    def value(self, fits: Callable[[Shape], bool] = lambda shape: True) -> str | None:
        """The name of a value whose sizes fit, the latest as the simplest."""
        names = [name for name, shape in self.values.items() if fits(shape)]
        return self.of(*reversed(names)) if names else None

    def fit(self, dims: int) -> tuple[str, tuple[int, ...]] | None:
        """A value as one of so many dimensions, and its sizes behind the batch."""
        name = self.value(plain)
        if name is None:
            return None
        code, sizes = name, [size for size in self.values[name][1:] if size is not None]
        if len(sizes) + 1 > dims:
            code, sizes = f"{code}.flatten({dims - 1})", [
                *sizes[: dims - 2], math.prod(sizes[dims - 2 :])
            ]  # fmt: skip
        while len(sizes) + 1 < dims:
            parts = [each for each in (2, 3, 4) if sizes and sizes[-1] % each == 0]
            part = self.of(1, *parts)
            if part == 1:
                code, sizes = f"{code}.unsqueeze(1)", [1, *sizes]
            else:
                code, sizes = f"{code}.unflatten(-1, ({part}, -1))", [
                    *sizes[:-1], part, sizes[-1] // part
                ]  # fmt: skip
        return code, tuple(sizes)

    # Lines

    def layer(self, code: str) -> str:
        """What the layer is called."""
        made = eval(code, {"nn": nn, "torch": torch})
        if isinstance(made, nn.Module):
            made.eval().requires_grad_(False)
        setattr(self._module, f"m{len(self.layers)}", made)
        self.layers.append(code)
        return f"self.m{len(self.layers) - 1}"

    def put(self, code: str) -> str | None:
        """Add a line that computes a value; its name, or None if it cannot be computed."""
        name = f"v{len(self.lines)}"
        found = []
        for space in self._spaces:
            try:
                found.append(eval(code, space))
            except (RuntimeError, ValueError, IndexError, TypeError):
                return None
        small = all(0 < each.numel() <= _MOST and each.isfinite().all() for each in found)
        if not small or found[0].abs().max() > 1e3 or found[0].abs().max() < 1e-2:
            return None
        for space, each in zip(self._spaces, found, strict=True):
            space[name] = each
        self.lines.append(f"{name} = {code}")
        sizes = zip(*(each.shape for each in found), strict=True)
        self.read |= {each for each in self.values if each in code}
        self.values[name] = tuple(a if a == b else None for a, b in sizes)
        return name

    def do(self, code: str) -> None:
        """Add a line that changes a value in place."""
        for space in self._spaces:
            exec(code, space)
        self.lines.append(code)

    def owned(self, name: str) -> bool:
        """Whether a value shares no memory with an input, nor repeats its own."""
        space = self._spaces[0]
        inputs = {space[each].untyped_storage().data_ptr() for each in self.given}
        value = space[name]
        return value.untyped_storage().data_ptr() not in inputs and value.is_contiguous()

    def program(self) -> Program:
        """What has been written, which returns what nobody has read, the last three of it."""
        left = [name for name in self.values if name not in (*self.read, *self.given)][-3:]
        left = left or [name for name in self.values if name not in self.given][-1:]
        if len(left) == 1:
            result = left[0]
        elif self.of(True, False):
            result = ", ".join(left)
        else:
            result = "{" + ", ".join(f'"{each}": {each}' for each in left) + "}"
        batches = self.of(SIZES, (1, 6), (4, 3), (6, 1), (2, 5))
        return Program(tuple(self.inputs), tuple(self.layers), tuple(self.lines), result, batches)


def plain(shape: Shape) -> bool:
    """Whether the batch comes first and nothing else depends on it."""
    return len(shape) > 1 and shape[0] is None and None not in shape[1:]
