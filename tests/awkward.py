"""Small models that are awkward to capture or to quantize, each for one reason.

``AWKWARD[name].build()`` is seeded and in eval mode; ``inputs(batch)`` gives ``(args, kwargs)``,
new objects at each call, with other data for another batch size. An entry has its builder's name.
Here: control flow, objects, sharing, inputs, outputs, writes in place. ``awkward_ops``,
``awkward_sequences``: the rest.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from awkward_ops import AwkwardEntry, Call, Linears, awkward, pictures, rows
from awkward_sequences import AWKWARD
from models import normal, tokens
from torch import Tensor, nn

__all__ = ["AWKWARD", "AwkwardEntry", "PlainCache"]


# ---- control flow that depends on the data


@awkward("flow", rows(24, 16), "an `if` on the data, always the same way", exports=False)
class BranchOnData(Linears):
    count = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.l0(x).relu()
        if x.abs().mean() > 0.01:
            return self.l3(self.l1(x).relu())
        return self.l3(self.l2(x))


@awkward("flow", rows(24, 16), "batch 3 takes a branch that batch 1 does not", exports=False)
class BranchSwitches(Linears):
    count = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.l0(x).relu()
        x = self.l1(x) if x.abs().sum() < 300 else self.l2(x)
        return self.l3(x.relu())


@awkward("flow", rows(24, 16), "a shared block, called until the data says stop", exports=False)
class LoopOnData(Linears):
    def forward(self, x: Tensor) -> Tensor:
        while x.norm(dim=-1).max() > 1:
            x = self.l0(x).relu() * 0.7
        return self.l1(x)


@awkward("flow", rows(24, 16), "tokens go to experts; each sees another number", exports=False)
class RoutedExperts(Linears):
    count = 4

    def forward(self, x: Tensor) -> Tensor:
        flat = self.l0(x).flatten(0, 1)
        choice = x.flatten(0, 1)[:, :3].argmax(-1)
        mixed = torch.zeros_like(flat)
        for index, expert in enumerate((self.l1, self.l2, self.l3)):
            mine = (choice == index).nonzero().squeeze(-1)
            if mine.numel():
                mixed.index_copy_(0, mine, expert(flat[mine]).relu())
        return mixed.view_as(x)


@awkward("flow", rows(24, 16), "a check on the values before any work", exports=False)
class ChecksValues(Linears):
    def forward(self, x: Tensor) -> Tensor:
        if not torch.isfinite(x).all():
            raise ValueError("inputs must be finite")
        return self.l1(self.l0(x).relu())


@awkward(
    "flow", rows(6, 16), "the glue borrows a child's weight and calls its methods", exports=False
)
class BorrowsFromChild(Linears):
    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.l0.weight[:8]).relu()
        x = torch.cat([x, x * -0.5], -1)
        return self.l1.forward(x) if float(x.detach().sum()) > 0 else x


@awkward("flow", rows(24, 16), "conditions on a shape alone; layers skipped by it")
class ShapeCondition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            if x.shape[1] > 4 or index % 2:
                x = layer(x).relu() if index < 3 else layer(x)
        return x


# ---- objects that torch does not know


class PlainCache:
    """States by layer, grown at each update; no pytree node, so no input of an exported graph."""

    def __init__(self) -> None:
        self.states: dict[int, Tensor] = {}

    def update(self, layer: int, state: Tensor) -> Tensor:
        old = self.states.get(layer)
        self.states[layer] = state if old is None else torch.cat([old, state], dim=1)
        return self.states[layer]


class CachedLayer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.query, self.state = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor, cache: PlainCache) -> Tensor:
        x = self.norm(x)
        states = cache.update(self.index, self.state(x))
        weights = (self.query(x) @ states.transpose(1, 2) / 4).softmax(-1)
        return x + weights @ states


class CachedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CachedLayer(index) for index in range(2))

    def run(self, x: Tensor, cache: PlainCache) -> Tensor:
        for layer in self.layers:
            x = layer(x, cache)
        return x


@awkward("objects", rows(12, 16), "layers pass each other a plain object and update it")
class CacheWithin(CachedLayers):
    def forward(self, x: Tensor) -> Tensor:
        cache = PlainCache()
        return self.run(self.run(x, cache), cache)


@awkward(
    "objects",
    lambda batch: ((normal(batch, 12, 16), PlainCache()), {}),
    "the caller's own object goes in and comes back changed",
    exports=False,
)
class CacheArgument(CachedLayers):
    def forward(self, x: Tensor, cache: PlainCache) -> Tensor:
        return self.run(self.run(x, cache), cache)


@dataclass
class PlainOutput:
    logits: Tensor
    hidden: Tensor


@awkward("objects", rows(24, 16), "returns a dataclass that is no pytree node", exports=False)
class DataclassOutput(Linears):
    def forward(self, x: Tensor) -> PlainOutput:
        hidden = self.l0(x).relu()
        return PlainOutput(self.l1(hidden), hidden)


@awkward("objects", rows(24, 16), "holds a lock: neither deepcopy nor pickle")
class Uncopyable(Linears):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.l1(self.l0(x).relu())


@awkward(
    "objects", rows(24, 16), "the user's own hooks change an input and an output", exports=False
)
class UserHooks(Linears):
    def __init__(self) -> None:
        super().__init__()
        self.l0.register_forward_hook(lambda _module, _args, out: out.clamp(min=0) * 2)
        self.l1.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))

    def forward(self, x: Tensor) -> Tensor:
        return self.l1(self.l0(x))


# ---- modules and weights that are shared


@awkward("shared", rows(24, 16), "one linear, called three times")
class ReusedLinear(Linears):
    count = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.l0(self.l0(self.l0(x).relu()) * 3)


class SharedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


@awkward("shared", rows(24, 16), "one block in a loop")
class SharedBlockLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = SharedBlock(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return self.head(x)


@awkward("shared", rows(24, 16), "a plain list names one submodule twice")
class ListedTwice(Linears):
    def __init__(self) -> None:
        super().__init__()
        self.stages = [self.l0, self.l1, self.l0]

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x).relu()
        return x


@awkward("shared", lambda b: ((tokens(b),), {}), "embedding and output head share a parameter")
class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(64, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(ids)).tanh())


# ---- inputs that are not a few tensors


def _dicts(batch: int) -> Call:
    first = {"left": normal(batch, 24, 16), "right": normal(batch, 24, 16, salt=1)}
    return (first,), {}


@awkward("inputs", _dicts, "one dict of tensors")
class DictInput(Linears):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.l0(batch["left"]).relu() + self.l1(batch["right"])


def _nested(batch: int) -> Call:
    levels = [
        {"x": normal(batch, 24, 16, salt=i), "w": normal(batch, 1, 1, salt=i + 1).sigmoid()}
        for i in (0, 2)
    ]
    return (levels,), {"pair": (normal(batch, 24, 16, salt=4), None)}


@awkward("inputs", _nested, "a list of dicts of tensors, and a tuple with a None")
class NestedInput(Linears):
    def forward(
        self, levels: list[dict[str, Tensor]], *, pair: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        x = torch.stack([level["x"] * level["w"] for level in levels]).sum(0)
        x = self.l0(x).relu() + pair[0]
        return self.l1(x if pair[1] is None else x + pair[1])


@awkward(
    "inputs", lambda b: ((normal(b, 24, 16), None), {"extra": None}), "optional inputs left None"
)
class NoneInput(Linears):
    def forward(
        self, x: Tensor, scale: Tensor | None, extra: Tensor | None = None, unused: Any = None
    ) -> Tensor:
        x = self.l0(x if scale is None else x * scale).relu()
        return self.l1(x if extra is None else x + extra)


@awkward(
    "inputs",
    lambda b: ((normal(b, 24, 16), 2), {"act": "gelu", "half": True, "slope": 0.5}),
    "an int, a str, a bool and a float decide what is computed",
)
class FlagInputs(Linears):
    def forward(self, x: Tensor, times: int, *, act: str, half: bool, slope: float) -> Tensor:
        for _ in range(times):
            x = F.gelu(self.l0(x)) if act == "gelu" else F.leaky_relu(self.l0(x), slope)
        return self.l1(x * slope if half else x)


@awkward(
    "inputs",
    lambda b: ((normal(b, 24, 16), normal(b, 24, 16, salt=1)), {"bias": normal(b, 24, 16, salt=2)}),
    "`*args` and `**kwargs` in the signature",
)
class VariadicInputs(Linears):
    def forward(self, *parts: Tensor, **named: Tensor) -> Tensor:
        return self.l1(self.l0(sum(parts)).relu() + named["bias"])


@awkward(
    "inputs",
    lambda b: ((normal(b, 24, 16), torch.tensor(0.7), normal(b, 24, 1) > 0), {}),
    "a tensor without dimensions, and a bool tensor",
)
class ScalarAndBoolInputs(Linears):
    def forward(self, x: Tensor, temperature: Tensor, keep: Tensor) -> Tensor:
        x = torch.where(keep, self.l0(x), -x) / temperature
        return self.l1(x.relu())


@awkward("inputs", lambda b: ((normal(12, b, 16, salt=b),), {}), "time first: the batch is dim 1")
class BatchSecond(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return self.l1(self.l0(x).relu()).mean(0)


# ---- outputs that are not one tensor


class Pair(NamedTuple):
    mean: Tensor
    scale: Tensor


@awkward("outputs", rows(24, 16), "a dict with a tuple, a NamedTuple, an int and a list")
class NestedOutput(Linears):
    count = 3

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = self.l0(x).relu()
        pair = Pair(self.l1(hidden), F.softplus(self.l2(hidden)))
        return {"hidden": (hidden, [hidden[:, :4], 16]), "pair": pair}


@awkward("outputs", rows(24, 16), "a tuple with a None, and the input itself")
class NoneOutput(Linears):
    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        return self.l1(self.l0(x).relu()), None, x


# ---- writes in place


@awkward("in_place", rows(24, 16), "relu_, add_, +=, and an assignment to a slice")
class InPlace(Linears):
    count = 3

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.l0(x))
        y += x
        z = self.l1(y).add_(y)
        z[:, 0] = 0.5
        z[:, 8:].mul_(2.0)
        return self.l2(F.relu_(z))


@awkward("in_place", rows(24, 16), "writes a part of a tensor that another op has read before")
class InPlaceAfterRead(Linears):
    count = 3

    def forward(self, x: Tensor) -> Tensor:
        y = self.l0(x)
        before = self.l1(y)
        y[:, ::2].relu_()
        return before + self.l2(y)


@awkward("in_place", pictures, "rectifies the caller's own tensor (twice is as once)")
class InPlaceOnInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(3, 8, 3)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.conv(self.relu(x))))
