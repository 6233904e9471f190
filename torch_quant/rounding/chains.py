"""Chains: blocks of one kind that hand a tensor from one to the next, as decoder layers do."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from torch_quant.algorithms.blocks import Sample, fresh
from torch_quant.errors import InvalidConfig
from torch_quant.graph.binding import signature_of
from torch_quant.graph.examples import example_call

__all__ = [
    "Chain", "Recorder", "Rounded", "call", "find_chains", "recorded", "replaced",
]  # fmt: skip

_NOTHING = torch.empty(0)


@dataclass(frozen=True)
class Chain:
    """Blocks of one kind, each fed by the one before.

    Args:
        paths: of the blocks in the model, in the order in which they run.
    """

    paths: tuple[str, ...]


def call(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` with a batch; a decoder makes no cache, which every block would copy."""
    args, kwargs = example_call(batch)
    if "use_cache" in signature_of(model.forward).parameters:
        kwargs = {"use_cache": False, **kwargs}
    return model(*args, **kwargs)


def find_chains(model: nn.Module, batch: Any) -> list[Chain]:
    """The chains of a model, in the order in which they run.

    Args:
        model: a twin in eval mode; hooks stand on it for one call.
        batch: as ``example_inputs`` of :meth:`Quantizer.calib`.
    """
    candidates = [
        tuple(f"{path}.{name}".strip(".") for name in module._modules)
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _alike(module)
    ]
    named = dict(model.named_modules())
    seen: dict[str, list[tuple[Tensor | None, Any]]] = {}
    handles = []
    for path in {path for chain in candidates for path in chain}:

        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any, path: str = path) -> None:
            place = place_of(args, kwargs)
            given = None if place is None else Sample(args, kwargs, place).hidden
            seen.setdefault(path, []).append((given, out))

        handles.append(named[path].register_forward_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = [Chain(paths) for paths in candidates if _is_chain([seen.get(p, []) for p in paths])]
    outer = [
        chain
        for chain in found
        if not any(_inside(chain.paths[0], other.paths) for other in found if other is not chain)
    ]
    order = {path: i for i, path in enumerate(seen)}
    return sorted(outer, key=lambda chain: order[chain.paths[0]])


def _alike(module: nn.Module) -> bool:
    children = list(module._modules.values())
    kinds = {type(child) for child in children}
    first = next(iter(kinds), None)
    deep = first is not None and any(child is not None and child._modules for child in children)
    return len(children) > 1 and len(kinds) == 1 and deep


def _is_chain(calls: list[list[tuple[Tensor | None, Any]]]) -> bool:
    """Whether each was called once, with the very tensor that the one before gave."""
    if any(len(each) != 1 or each[0][0] is None for each in calls):
        return False
    for (before,), (after,) in itertools.pairwise(calls):
        made = before[1][0] if isinstance(before[1], (tuple, list)) and before[1] else before[1]
        if made is not after[0]:
            return False
    return True


def _inside(path: str, others: Iterable[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others)


def place_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Where the first float tensor of a call stands."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return i
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return name
    return None


class _InPlaceOfBlock(nn.Module):
    """Has the attributes of the block that it stands for, which code around it reads.

    Args:
        block: the block.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # code around it reads attributes of the block
            return getattr(super().__getattr__("block"), name)


class Recorder(_InPlaceOfBlock):
    """Stands for a block: notes its calls and passes them on.

    Args:
        block: the block.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.calls: list[Sample] = []
        self.first = True
        self.last = False
        """Whether what comes behind need not run."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block gives."""
        place = place_of(args, kwargs)
        if place is None:
            raise InvalidConfig("a block was called without a float tensor in a later batch")
        kept = fresh((args, kwargs))
        sample = Sample(kept[0], kept[1], place)  # only of the first block is its input kept
        self.calls.append(sample if self.first else sample.with_hidden(torch.empty(0)))
        if self.last:
            raise Recorded
        return self.block(*args, **kwargs)

    def repeat(self, sample: Sample) -> None:
        """Note a call like that of another block, without its hidden tensor."""
        self.calls.append(sample.with_hidden(torch.empty(0)))


class Recorded(BaseException):
    """Ends a call of the model once all is known of it; nothing that the model catches."""


def alike(first: Sample, other: Sample) -> bool:
    """Whether two blocks are called with the same, but for the hidden tensor.

    Tensors have to be the very same ones, and everything else a plain value.
    """
    if first.place != other.place:
        return False
    (mine, nest), (theirs, nest_of_other) = map(_leaves, (first, other))
    return nest == nest_of_other and all(map(_same, mine, theirs))


def _leaves(sample: Sample) -> tuple[list[Any], Any]:
    plain = sample.with_hidden(_NOTHING)
    return tree_flatten((plain.args, dict(plain.kwargs)))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return isinstance(a, (int, float, str, type(None))) and type(a) is type(b) and a == b


class Rounded(_InPlaceOfBlock):
    """Stands for a block whose weights are rounded: it computes with them for the time of a call.

    Args:
        block: the block, which holds the float model's weights.
        rounded: gives it the rounded ones, and takes them away.
    """

    def __init__(
        self, block: nn.Module, rounded: Callable[[], AbstractContextManager[None]]
    ) -> None:
        super().__init__(block)
        self.__dict__["rounded"] = rounded

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block gives."""
        with self.rounded():
            return self.block(*args, **kwargs)


def replaced(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put ``module`` under ``path``; returns what was there."""
    parent, _, name = path.rpartition(".")
    owner = root.get_submodule(parent)
    old = owner._modules[name]
    assert old is not None
    owner._modules[name] = module
    return old


def recorded(twin: nn.Module, chain: Chain, batches: Sequence[Any]) -> list[Recorder]:
    """The calls of the blocks of a chain, with the model's embeddings as they are now.

    Args:
        twin: of the model.
        chain: some of its blocks.
        batches: inputs of the model.
    """
    recorders = [Recorder(twin.get_submodule(path)) for path in chain.paths]
    for i, (path, recorder) in enumerate(zip(chain.paths, recorders, strict=True)):
        recorder.first = i == 0
        replaced(twin, path, recorder)
    first, *others = recorders
    for i, batch in enumerate(batches):
        with contextlib.suppress(Recorded):
            call(twin, batch)
        if first.last:  # blocks that got in batch 0 what the first got do so again
            for each in others:
                each.repeat(first.calls[-1])
        if any(len(each.calls) != i + 1 for each in recorders):
            raise InvalidConfig(
                f"batch {i} runs the blocks of {chain.paths[0]} another number of times than "
                "batch 0; leave it out"
            )
        if i == 0:
            first.last = all(alike(first.calls[0], each.calls[0]) for each in others)
    for path, recorder in zip(chain.paths, recorders, strict=True):
        replaced(twin, path, recorder.block)
    return recorders
