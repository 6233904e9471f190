"""What ``torch.jit.trace`` cannot see: Python code that decides by what a tensor holds.

Traced code runs as it ran on the example. A number that Python reads from a tensor is a constant
of the trace, and so is the branch that it takes. Here every tensor is followed from the inputs on,
while the model is traced, so that such a place is found and a mere constant of the model's is not.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["TensorReads"]

_VALUE, _SIZE, _LENGTH = 1, 2, 4
"""Labels: holds values that depend on the inputs'; on sizes only; its size depends on values."""

_READS = {
    "__bool__": "as a condition", "__int__": "as a Python int", "__float__": "as a Python float",
    "__index__": "as a Python int", "__complex__": "as a Python number", "item": "by item()",
    "_local_scalar_dense": "by item()", "tolist": "by tolist()", "numpy": "as a NumPy array",
    "_numpy": "as a NumPy array", "__array__": "as a NumPy array",
    "is_nonzero": "as a condition", "equal": "by torch.equal",
    "allclose": "by torch.allclose", "__contains__": "by `in`", "cond": "by torch.cond",
    "while_loop": "by torch.while_loop", "tensor": "by torch.tensor", "new_tensor": "by new_tensor",
    "__len__": "by len()", "__format__": "as text", "__repr__": "as text",
}  # fmt: skip
_COPIES = ("tensor", "new_tensor")
"""Make a constant of what they read."""
_SIZES = frozenset({"size", "numel", "nelement", "sym_size", "sym_numel", "__len__", "stride"})
_UNROLLS = frozenset({"unbind", "split", "chunk", "tensor_split", "__iter__"})
_SIZED_BY_VALUES = frozenset({
    "nonzero", "nonzero_numpy", "argwhere", "masked_select", "unique", "unique_consecutive",
    "_unique2", "unique_dim", "repeat_interleave", "bincount", "_pad_packed_sequence",
})  # fmt: skip
_MADE_TO_SIZE = frozenset({
    "arange", "zeros", "ones", "full", "empty", "rand", "randn", "linspace", "eye",
})  # fmt: skip
_CUT_TO_SIZE = frozenset({
    "narrow", "expand", "repeat", "view", "reshape", "tile", "new_zeros", "new_ones", "new_full",
    "new_empty", "slice", "one_hot", "pad", "unflatten", "resize_",
})  # fmt: skip
"""The same of a tensor, their first argument."""
_MOST = 3
"""Places that a message lists."""
_SITE = Path(torch.__file__).parent
_PACKAGES = tuple(
    f"{folder}{os.sep}"
    for folder in (
        _SITE,
        _SITE.with_name("intel_extension_for_pytorch"),  # it wraps methods of tensors
        Path(__file__).parent.parent,
    )
)
_FRAME = re.compile(r'File "(.*)", line (\d+)')


class TensorReads(TorchFunctionMode):
    """While it is entered, follows ``inputs`` and notes where Python reads what follows from them.

    Args:
        inputs: the example that is traced.
    """

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self._labels: dict[int, tuple[StorageWeakRef, int]] = {}
        self.of_values: dict[str, str] = {}
        """Place -> how a value of a tensor was read there."""
        self.of_sizes: dict[str, str] = {}
        """Place -> how a size was read there."""
        for x in _tensors(inputs):
            self._add(x, _VALUE)

    def describe(self, reads: dict[str, str]) -> str:
        """``net.py:12 (if x.sum() > 0:) as a condition``, of the first few places."""
        found = [f"{place}, {how}" for place, how in reads.items()]
        more = [f"and {len(found) - _MOST} more places"] if len(found) > _MOST else []
        return "; ".join([*found[:_MOST], *more])

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        before = [self._of(x) for x in _tensors((args, kwargs))]
        known = 0
        for each in before:
            known |= each
        self._note(name, before, known)
        result = func(*args, **kwargs)
        if known or name in _SIZES or name == "shape":
            self._pass_on(name, known, args, kwargs, result)
        return result

    def _note(self, name: str, before: list[int], known: int) -> None:
        first = before[0] if before else 0
        if name in _UNROLLS:
            if first & _LENGTH and not _is_in_graph():  # graphs are unrolled by sizes alone
                self.of_values.setdefault(_place(), "by a loop over what it found")
        elif name == "__len__":
            if first:
                reads = self.of_values if first & _LENGTH else self.of_sizes
                reads.setdefault(_place(), _READS[name])
        elif name in _READS and known & _VALUE:
            self.of_values.setdefault(_place(), _READS[name])
        elif name in _READS and known & _SIZE and name not in _COPIES:
            self.of_sizes.setdefault(_place(), _READS[name])

    def _pass_on(self, name: str, known: int, args: Any, kwargs: Any, result: Any) -> None:
        if name in _SIZES or name == "shape":
            for x in _tensors(result):
                self._add(x, _VALUE if known & _LENGTH else _SIZE)
            return
        if name.endswith("_") or name == "__setitem__":
            changed = next(_tensors(args), None)
            if changed is not None:
                self._add(changed, known & ~_LENGTH)
        if kwargs.get("out") is not None:
            for x in _tensors(kwargs["out"]):
                self._add(x, known)
        label = known
        if self._sized_by_values(name, args, kwargs):
            label |= _LENGTH
        if name.endswith("_like") or name.startswith("new_"):
            label &= _LENGTH  # they read the size only
        for x in _tensors(result):
            self._add(x, label if x.dim() else label & ~_LENGTH)

    def _sized_by_values(self, name: str, args: Any, kwargs: Any) -> bool:
        if name in _SIZED_BY_VALUES or (name == "where" and len(args) + len(kwargs) == 1):
            return any(self._of(x) & _VALUE for x in _tensors((args, kwargs)))
        if name in ("__getitem__", "index"):
            masks = (x for x in _tensors(args[1:]) if x.dtype in (torch.bool, torch.uint8))
            ends = (x for x in _tensors(_ends(args[1])))
            return any(self._of(x) & _VALUE for x in (*masks, *ends))
        if name in _MADE_TO_SIZE or name in _CUT_TO_SIZE:
            rest = args[1:] if name in _CUT_TO_SIZE else args
            numbers = (
                x
                for x in _tensors((rest, kwargs))
                if x.dim() == 0 and not x.is_floating_point() and x.dtype != torch.bool
            )
            return any(self._of(x) & _VALUE for x in numbers)
        return False

    # Labels belong to memory, so that views and writes into them are followed too.

    def _of(self, x: Tensor) -> int:
        try:
            key = x.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):  # sparse tensors and the like have none
            return _VALUE
        found = self._labels.get(key)
        return 0 if found is None or found[0].expired() else found[1]

    def _add(self, x: Tensor, label: int) -> None:
        try:
            storage = x.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return
        self._labels[storage._cdata] = (StorageWeakRef(storage), self._of(x) | label)


def _name(func: Any) -> str:
    """``add`` of a method, function or operator; ``shape`` of the property."""
    if isinstance(func, torch._ops.OpOverload):
        return func._opname
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", ""))
    return str(name)


def _tensors(value: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, slice):
            yield from _tensors(_ends(leaf))
        elif isinstance(leaf, torch.Size):
            sizes: tuple[Any, ...] = tuple(leaf)  # tensors while a trace is recorded
            yield from (x for x in sizes if isinstance(x, Tensor))


def _ends(index: Any) -> list[Any]:
    """The ends of the slices in an index."""
    items = index if isinstance(index, tuple) else (index,)
    return [end for each in items if isinstance(each, slice) for end in (each.start, each.stop)]


# Places


def _place() -> str:
    """File, line and text of the model's code that called PyTorch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith("<eval_with_key>"):
            return _in_graph(frame.f_locals.get("self"))
        if not file.startswith(_PACKAGES):
            return _line(file, frame.f_lineno)
        frame = frame.f_back
    return "code of PyTorch"


def _is_in_graph() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith("<eval_with_key>"):
        frame = frame.f_back
    return frame is not None


def _in_graph(gm: Any) -> str:
    """The place that an operator of a captured graph was captured from."""
    for node in gm.graph.nodes if isinstance(gm, fx.GraphModule) else ():
        if node.op == "call_function" and _name(node.target) in _READS:
            found = _FRAME.findall(node.meta.get("stack_trace") or "")
            return _line(found[-1][0], int(found[-1][1])) if found else f"{node.target}"
    return "a captured graph"


def _line(file: str, number: int) -> str:
    text = linecache.getline(file, number).strip()
    return f"{file}:{number}" + (f" ({text})" if text else "")
