"""Multiply-accumulates of everything: of operators that are no sites, and of plain Python code.

A product of tensors counts, whatever computes it; sums, element-wise products and transforms (FFT)
do not. In graphs, composite operators (``einsum``) are decomposed on tensors without data.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from torch_quant.core.plan import FloatOp
from torch_quant.graph.foreign import is_foreign, see_higher_order
from torch_quant.graph.picks import Follower, Picks
from torch_quant.graph.sites import is_constant, is_float, key_of, module_path, op_name, results
from torch_quant.ops.table import (
    FLOAT_MACS,
    INT8_NEVER,
    OPERATORS,
    SIZES,
    OpPattern,
    pattern_of,
    size_hints,
)
from torch_quant.ops.table import call_sizes as _sizes

__all__ = [
    "GLUE",
    "MacCounter",
    "counted",
    "float_products",
    "follow",
    "note_sizes",
    "uncounted",
]

logger = logging.getLogger("torch_quant")

aten = torch.ops.aten

GLUE = "Python code between the pieces"
"""The reason of what runs in float there."""
_COMPUTED = "its weight is computed from the inputs"
_NO_FORM = "no int8 form here"
_AUTOCAST = (
    "inside torch.autocast, so in the lower precision that it asks for: take autocast out of "
    "forward to have it quantized"
)
_NO_AUTOCAST = "inside torch.autocast(enabled=False), which asks for float32"
_SUBGRAPH = "inside a control-flow subgraph"

Formula = Callable[[Any, Any], int]


def _numel(value: Any) -> int:
    return math.prod(_sizes(value))


def _product(first: int, second: int) -> Formula:
    """Of ``[.., n, k]`` and ``[.., k, m]`` at these places among the arguments."""
    return lambda args, out: _numel(args[first]) * _sizes(args[second])[-1]


def _vector(place: int) -> Formula:
    """Each element of the argument is multiplied once."""
    return lambda args, out: _numel(args[place])


def _grouped(args: Any, out: Any) -> int:
    """Each row of the result sums over the columns; of two matrices, groups share the columns."""
    first, second = _sizes(args[0]), _sizes(args[1])
    if len(first) == len(second) == 2:  # groups divide what is summed over
        return first[0] * first[1] * second[1]
    return _numel(out) * first[-1]


def _convolution(args: Any, out: Any) -> int:
    transposed = args[6] if len(args) > 6 and isinstance(args[6], bool) else False
    return _numel(args[0] if transposed else out) * math.prod(_sizes(args[1])[1:])


def _attention(args: Any, out: Any) -> int:
    query, key, value = map(_sizes, args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _trilinear(args: Any, out: Any) -> int:
    """Of ``[rows, i]``, ``[o, i, j]`` and ``[rows, j]``: rows x o x i x j products."""
    rows = _numel(args[0]) // max(_sizes(args[0])[-1], 1)
    return rows * _numel(args[1])


_FORMULAS: dict[Any, Formula] = {
    aten.mm: _product(0, 1), aten.bmm: _product(0, 1), aten.mv: _vector(0),
    aten.addmm: _product(1, 2), aten.baddbmm: _product(1, 2), aten.addbmm: _product(1, 2),
    aten.addmv: _vector(1), aten.dot: _vector(0), aten.vdot: _vector(0),
    aten._grouped_mm: _grouped, aten._scaled_mm: _product(0, 1), aten._int_mm: _product(0, 1),
    aten._trilinear: _trilinear,
    aten.convolution: _convolution, aten._convolution: _convolution,
    aten.convolution_overrideable: _convolution, aten.mkldnn_convolution: _convolution,
    aten.conv_tbc: lambda args, out: _numel(out) * math.prod(_sizes(args[1])[:2]),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
}  # fmt: skip
"""Operator without a row in the op table -> its multiply-accumulates, of arguments and result."""
_OTHERS: dict[str, Formula] = {"transformers::grouped_mm_fallback": _grouped}
"""The same, of operators of other libraries, by name."""


def _formula(target: Any) -> Formula | None:
    if not isinstance(target, torch._ops.OpOverload):
        return None
    packet = target.overloadpacket
    rows = (row.macs for row in OPERATORS.values() if packet in _packets(row))
    known = _FORMULAS.get(packet) or FLOAT_MACS.get(packet)
    return known or next(rows, None) or _OTHERS.get(target.name().partition(".")[0])


def _packets(row: OpPattern) -> list[Any]:
    return [target.overloadpacket for target in row.targets]


def _foreign(target: Any, values: Iterable[Any]) -> bool:
    """Whether it is another library's operator that may multiply: it reads two float tensors."""
    if not is_foreign(target):
        return False
    floats = [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]
    return len(floats) > 1


def _composite(target: Any) -> bool:
    """Whether an operator is made of others, which can be counted."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return isinstance(target, torch._ops.OpOverload) and target.has_kernel_for_dispatch_key(key)


class MacCounter(TorchDispatchMode):
    """Counts what runs inside, by operator; no value changes.

    >>> with MacCounter() as counter:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> dict(counter.macs)
    {'mm': 24}
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()
        self._read: set[int] = set()
        """Storages of what operators have read."""
        self.follower = Follower()
        see_higher_order(MacCounter)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        self._read.update(filter(None, map(_storage, leaves)))
        formula = _formula(func)
        if formula is None and _composite(func):  # it comes whole in inference mode
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        out = func(*args, **kwargs)
        if formula is not None:
            parts = out if isinstance(out, (tuple, list)) else (out,)
            self.macs[op_name(func)] += formula(args, parts[0])
        else:
            self.follower.step(func, leaves, out)
            if _foreign(func, leaves):
                self.macs[op_name(func)] += 0
        return out

    def has_read(self, x: Tensor) -> bool:
        """Whether an operator has read the values of ``x``, or a view of it."""
        place = _storage(x)
        return place is None or place in self._read


def _storage(x: Any) -> int | None:
    """What tells the memory of a tensor."""
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        return None
    return int(x.untyped_storage()._cdata)


@contextlib.contextmanager
def counted(macs: dict[str, int]) -> Iterator[MacCounter | None]:
    """Count what runs inside into ``macs``, unless something was counted before.

    Gives what counts, None if nothing does.
    """
    if macs:
        yield None
        return
    with MacCounter() as counter:
        yield counter
    macs.update({"": 0} | counter.macs)


def follow(results: Any, maker: Picks) -> None:
    """Have what is counted around a call note whether its results pick something."""
    counter = _get_current_dispatch_mode()
    if isinstance(counter, MacCounter):
        counter.follower.begin(results, maker)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Pause the innermost counter, if there is one: what follows counts elsewhere."""
    counter = _get_current_dispatch_mode()
    if not isinstance(counter, MacCounter):
        yield
        return
    counter.__exit__(None, None, None)
    try:
        yield
    finally:
        counter.__enter__()


class _Sizes(fx.Interpreter):
    """Runs a graph and notes the sizes of every tensor."""

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            n.meta[SIZES] = tuple(out.shape)
        return out

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, torch._ops.HigherOrderOperator) and "wrap" in op_name(target):
            args = tuple(_Sizes(x).run if isinstance(x, fx.GraphModule) else x for x in args)
        return super().call_function(target, args, kwargs)


def note_sizes(gm: fx.GraphModule, tensors: tuple[Tensor, ...]) -> None:
    """Note the sizes of every tensor in a call, where those of the example do not tell them.

    They were others if the example was repeated to be captured, and none where they depend on data.

    Args:
        gm: as captured, its sizes symbolic.
        tensors: its inputs in that call.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    same = all(size_hints(n) == tuple(x.shape) for n, x in zip(inputs, tensors, strict=True))
    if not same or any(_by_data(node.meta.get("val")) for node in gm.graph.nodes):
        _Sizes(gm).run(*tensors)


def _by_data(value: Any) -> bool:
    sizes = value.shape if isinstance(value, Tensor) else ()
    return any(isinstance(size, torch.SymInt) and not size.node.has_hint() for size in sizes)


# Graphs


def float_products(gm: fx.GraphModule, sites: Collection[fx.Node], path: str = "") -> list[FloatOp]:
    """The operators of a canonical graph that multiply and are no sites, with the reason.

    Products of constants are none: they are computed once, when the model is quantized.

    Args:
        gm: the graph.
        sites: its nodes that are sites.
        path: of the module in the model.
    """
    memo: dict[fx.Node, bool] = {}
    found = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or is_constant(node, memo):
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            found += _inside(gm, node, path)
        elif node not in sites:
            macs = _macs(node)
            values = [x.meta.get("val") for x in node.all_input_nodes]
            if macs or node.target in INT8_NEVER or _foreign(node.target, values):
                found.append(FloatOp(key_of(node), op_name(node.target), macs, _reason(node)))
    return found


def _inside(gm: fx.GraphModule, call: fx.Node, path: str) -> list[FloatOp]:
    """The products of the graphs that a higher-order operator takes; of branches, the heaviest."""
    name = op_name(call.target)
    reason = _SUBGRAPH
    if "autocast" in name:
        reason = _AUTOCAST if call.args[2] else _NO_AUTOCAST
    branches = []
    for arg in pytree.tree_leaves((call.args, call.kwargs)):
        if not isinstance(arg, fx.Node) or arg.op != "get_attr":
            continue
        inner = attrgetter(str(arg.target))(gm)
        if isinstance(inner, fx.GraphModule):
            branches.append(_of_subgraph(inner, path, reason))
    if name == "cond" and branches:
        return max(branches, key=lambda ops: sum(op.macs for op in ops))
    return [op for ops in branches for op in ops]


def _of_subgraph(gm: fx.GraphModule, path: str, reason: str) -> list[FloatOp]:
    found: list[FloatOp] = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            found += _inside(gm, node, path)
        elif macs := _macs(node):
            where = ".".join(part for part in (path, module_path(node), node.name) if part)
            found.append(FloatOp(where, op_name(node.target), macs, reason))
    return found


def _reason(node: fx.Node) -> str:
    never: dict[Any, str] = INT8_NEVER
    if node.target in never:
        return never[node.target]
    pattern = pattern_of(node)
    if pattern is None:
        foreign = is_foreign(node.target)
        return f"an operator of {node.target.namespace}" if foreign else _NO_FORM  # type: ignore[union-attr]
    found = results(node)
    if not found or not is_float(found[0]):
        return "it multiplies no floats"
    return _COMPUTED if pattern.weight is not None else _NO_FORM


def _macs(node: fx.Node) -> int:
    if (formula := _formula(node.target)) is not None:
        return formula(node.args, next(iter(results(node)), node))
    tensors = [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), Tensor)]
    return _decomposed(node) if len(tensors) > 1 and _composite(node.target) else 0


def _decomposed(node: fx.Node) -> int:
    """What a composite operator's parts count, on tensors without data."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), _without_data)
    try:
        with torch.no_grad(), MacCounter() as counter:
            node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:  # an operator that looks at values raises what it likes
        logger.debug("the products of %s are not counted: %s", node, error)
        return 0
    return sum(counter.macs.values())


def _without_data(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        sizes = node.meta.get(SIZES, size_hints(value))
        return torch.empty(sizes, dtype=value.dtype, device="meta")
    if isinstance(value, torch.SymInt):
        return int(value.node.hint) if value.node.has_hint() else 1
    return value
