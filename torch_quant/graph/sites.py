"""Names: every tensor of a captured graph gets a stable key, every quantizable op is a site."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torch_quant.core.window import Window
from torch_quant.graph.picks import decisive
from torch_quant.ops.arguments import argument, part_of, positional
from torch_quant.ops.table import (
    ACTIVATIONS,
    DATA_MOVEMENT,
    KEY,
    RECTIFIERS,
    ROW_MOVEMENT,
    OpPattern,
    pattern_of,
    size_hints,
)

__all__ = [
    "KEY",
    "ORIGIN",
    "Site",
    "behind",
    "computed_channels",
    "find_sites",
    "fused_output",
    "is_constant",
    "is_float",
    "is_vector",
    "key_of",
    "local_name",
    "module_path",
    "name_tensors",
    "op_name",
    "operands",
    "results",
    "source",
    "weights",
]

aten = torch.ops.aten

MODULE = "torch_quant_module"
"""Entry of ``node.meta``: path of the innermost module the node runs in, in the whole model."""
ORIGIN = "torch_quant_origin"
"""Entry of ``node.meta``: name of the node of the captured graph that computes the same tensor."""


@dataclass(frozen=True)
class Site:
    """One quantizable operator of a captured model.

    Args:
        name: the module's path, plus the operator where the module computes more than that.
        op: its row in the op table.
        module: path of the innermost module it runs in.
        inputs: keys of the activations it takes, in the row's order.
        internals: keys of the tensors that exist only inside it.
        output: key of its result, the first that is read if it has several.
        macs: multiply-accumulates on the captured example.
        weight_shape: sizes of its weight, empty without one; of several, how many values they have.
        fused_output: key of what a convolution leaves behind, its result or that of the rectifier
            which alone uses it, or of the bags of embeddings: some kernels give nothing but
            integers there. Empty for other operators.
        result: key of its own result, whatever function is behind it.
        smoothable: whether the last dimension of its input's source is that of its weight, so that
            statistics of channels recorded there hold for the input.
        channels: the axis of the input's channels, counted from the end, if they lie so in its
            source too.
        repeatable: whether linear layers compute its input's channels, so that they may compute
            some twice, and linear layers alone read them.
        picks: whether something is picked by its result, as experts by a router.
        window: what it reads for each of its results, if that is a part of an image that lies in
            the source of its input as in the input itself.
    """

    name: str
    op: str
    module: str
    inputs: tuple[str, ...]
    internals: tuple[str, ...]
    output: str
    macs: int
    weight_shape: tuple[int, ...]
    fused_output: str = ""
    result: str = ""
    smoothable: bool = False
    channels: int | None = None
    repeatable: bool = False
    picks: bool = False
    window: Window | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of every tensor that a grid may be wanted for."""
        ends = [key for key in (self.fused_output, self.result) if key]
        return (*self.inputs, *self.internals, self.output, *ends)

    @property
    def ranged(self) -> frozenset[str]:
        """Keys of the tensors whose ranges are recorded whatever the backend is."""
        return frozenset((*self.inputs, *self.internals, self.output, self.fused_output))


def module_path(node: fx.Node) -> str:
    """Path of the innermost module ``node`` ran in, ``@1`` and up for its later calls."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    key, (path, _) = list(stack.items())[-1]
    if path.startswith("_empty_nn_module_stack"):
        return ""
    _, at, call = str(key).partition("@")
    return f"{path}{at}{call}"


def op_name(target: Any, default: str = "") -> str:
    """The bare name of an operator: ``aten._grouped_mm.default`` is ``grouped_mm``."""
    name = getattr(target, "_opname", None) or getattr(target, "__name__", default)
    return str(name).strip("_")


def name_tensors(graph: fx.Graph, prefix: str = "") -> None:
    """Give every node a key, unique and the same each time the same code is captured.

    Args:
        graph: a canonical graph.
        prefix: path of the captured module in the whole model.
    """
    weighted = Counter(
        module_path(node)
        for node in graph.nodes
        if (p := pattern_of(node)) and p.weight is not None
    )
    taken: set[str] = set()
    numbered: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "get_attr":
            name = f"{prefix}.{node.target}".strip(".")
        elif node.op == "placeholder":
            name = f"{prefix}:{node.target}"
        else:
            path = module_path(node)
            full = node.meta[MODULE] = ".".join(part for part in (prefix, path) if part)
            pattern = pattern_of(node)
            alone = pattern is not None and pattern.weight is not None and weighted[path] == 1
            name = (
                full if alone and full else f"{full}.{op_name(node.target, node.name)}".strip(".")
            )
        key = name
        while key in taken:
            numbered[name] += 1
            key = f"{name}_{numbered[name]}"
        taken.add(key)
        node.meta[KEY] = key


def key_of(node: fx.Node) -> str:
    """The key of the tensor that ``node`` computes."""
    return str(node.meta[KEY])


def local_name(node: fx.Node) -> str:
    """The key of a site's result inside of the captured module: without the path of that."""
    path, full = module_path(node), str(node.meta[MODULE])
    prefix = full.removesuffix(path).strip(".")
    return key_of(node).removeprefix(prefix).removeprefix(".")


def is_constant(node: fx.Node, _memo: dict[fx.Node, bool] | None = None) -> bool:
    """Whether ``node``'s value depends on parameters and buffers only."""
    memo = {} if _memo is None else _memo
    waiting = [node]  # no recursion: a chain of operators is as long as the model is deep
    while waiting:
        each = waiting[-1]
        if each in memo:
            waiting.pop()
        elif each.op == "get_attr":
            # (An LSTM counts as impure, for the dropout that it could do.)
            users = [user for user in each.users if pattern_of(user) is None]
            memo[each] = not any(user.is_impure() for user in users)
        elif each.op == "call_function" and each.all_input_nodes and not each.is_impure():
            if not all(memo.get(n, True) for n in each.all_input_nodes):
                memo[each] = False
            elif unknown := [n for n in each.all_input_nodes if n not in memo]:
                waiting.append(unknown[0])
            else:
                memo[each] = True
        else:
            memo[each] = False
    return memo[node]


def source(node: fx.Node) -> fx.Node:
    """The node whose values ``node`` holds, behind operators that only move them."""
    return behind(node)[-1]


def behind(node: fx.Node) -> list[fx.Node]:
    """``node``, and the nodes whose values it holds, through to their source."""
    chain = [node]
    while chain[-1].op == "call_function" and chain[-1].target in DATA_MOVEMENT:
        chain.append(argument(chain[-1], 0))
    return chain


def is_float(node: fx.Node) -> bool:
    """Whether the captured value is a floating-point tensor."""
    value = node.meta.get("val")
    return value is not None and hasattr(value, "dtype") and value.dtype.is_floating_point


def operands(node: fx.Node, pattern: OpPattern) -> list[fx.Node]:
    """The activation arguments of a quantizable node."""
    found = [argument(node, place) for place in pattern.activations]
    assert all(isinstance(each, fx.Node) for each in found)
    return found


def weights(node: fx.Node, pattern: OpPattern) -> list[Any]:
    """What stands for the weight of a quantizable node: arguments, or each matrix of a list."""
    if pattern.weight is None:
        return []
    found = argument(node, pattern.weight)
    if not isinstance(found, (list, tuple)):
        return [found, *(argument(node, place) for place in pattern.more_weights)]
    return [each for each in found if len(size_hints(each)) == 2]


def _weight_shape(matrices: list[Any]) -> tuple[int, ...]:
    shapes = [size_hints(each) for each in matrices]
    return (sum(map(math.prod, shapes)),) if len(shapes) > 1 else next(iter(shapes), ())


def results(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operator gives: its node, or the parts of its tuple that are read."""
    if not isinstance(node.meta.get("val"), (tuple, list)):
        return [node]
    parts = [user for user in node.users if user.target is operator.getitem]
    return sorted(parts, key=lambda part: part_of(part)[1])


def fused_output(node: fx.Node, functions: Container[Any] = ACTIVATIONS) -> fx.Node:
    """``node``, or the activation function that alone uses it: where a kernel's output would be."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in functions else node


def _keeps_channels(arg: Any) -> bool:
    """Whether all that lies between ``arg`` and its source leaves the last dimension alone."""
    *moves, origin = behind(arg)
    channels = size_hints(arg)[-1]
    return all(move.target in ROW_MOVEMENT for move in moves) and all(
        size_hints(node)[-1:] == (channels,) for node in (*moves, origin)
    )


def _channels(pattern: OpPattern, node: fx.Node) -> int | None:
    """See :class:`Site`: vectors may be put into other rows, but images must be as they are."""
    if pattern.channels is None:
        return None
    arg = operands(node, pattern)[0]
    kept = _keeps_channels(arg) if pattern.channels == -1 else source(arg) is arg
    return pattern.channels if kept else None


def _window(pattern: OpPattern, node: fx.Node) -> Window | None:
    if pattern.window is None or _channels(pattern, node) is None:
        return None
    return pattern.window(node)


def computed_channels(x: fx.Node, readers: Collection[fx.Node]) -> list[fx.Node]:
    """The linear layers that compute the channels of ``x``, and all between them and it.

    Empty where something else reads one of these tensors, a function between sees more than single
    elements, or a layer's weight serves other calls too: then no layer can compute channels of
    ``x`` twice.

    Args:
        x: a tensor.
        readers: of it, which are to read the repeated channels.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 2))
    >>> graph = torch.export.export(model, (torch.ones(2, 2),)).module().graph
    >>> second = next(x for x in reversed(graph.nodes) if x.target is aten.linear.default)
    >>> computed_channels(argument(second, 0), [second])
    [gelu, linear]
    """
    found: dict[fx.Node, None] = {}
    return list(found) if _collect(x, readers, size_hints(x), found) else []


def _collect(
    x: Any, readers: Collection[fx.Node], sizes: tuple[int, ...], found: dict[fx.Node, None]
) -> bool:
    if not isinstance(x, fx.Node) or size_hints(x) != sizes or not set(x.users) <= set(readers):
        return False
    found[x] = None
    if x.target is aten.linear.default:
        constants = [each for each in positional(x)[1:] if each is not None]
        alone = all(isinstance(each, fx.Node) and is_constant(each) for each in constants)
        return alone and not _is_read_elsewhere(constants[0])
    if x.target in ACTIVATIONS:
        return _collect(argument(x, 0), [x], sizes, found)
    if x.target in (aten.mul.Tensor, aten.add.Tensor):
        sides = [each for each in positional(x)[:2] if isinstance(each, fx.Node)]
        sides = [each for each in sides if not is_vector(each, sizes)]
        return bool(sides) and all(_collect(each, [x], sizes, found) for each in sides)
    return False


def _is_read_elsewhere(x: fx.Node) -> bool:
    """Whether a constant, or what it is computed from, has several readers."""
    return len(x.users) > 1 or any(map(_is_read_elsewhere, x.all_input_nodes))


def is_vector(x: Any, sizes: tuple[int, ...]) -> bool:
    """Whether ``x`` is a constant for each channel."""
    return isinstance(x, fx.Node) and is_constant(x) and size_hints(x) == sizes[-1:]


def _is_repeatable(x: fx.Node) -> bool:
    """Copies cost a factor behind them, which keeps a grid from following a product at once; so a
    function that stands there anyway has to be among those between."""
    if not all(user.target is aten.linear.default for user in x.users):
        return False
    between = {each.target for each in computed_channels(x, x.users)}
    return bool(between & ACTIVATIONS.keys() - RECTIFIERS)


def find_sites(graph: fx.Graph) -> Iterator[tuple[fx.Node, OpPattern, Site]]:
    """Every site of a canonical graph in order: its node, its row and its description.

    A node qualifies if its operands are float tensors and its weight, if the row has one, is
    constant.
    """
    memo: dict[fx.Node, bool] = {}
    picking = decisive(graph)
    for node in graph.nodes:
        pattern = pattern_of(node)
        if pattern is None:
            continue
        found = results(node)
        if not found or not is_float(found[0]):
            continue
        matrices = weights(node, pattern)
        if not all(isinstance(each, fx.Node) and is_constant(each, memo) for each in matrices):
            continue
        key = key_of(node)
        site = Site(
            name=key,
            op=pattern.name,
            module=node.meta[MODULE],
            inputs=tuple(key_of(source(arg)) for arg in operands(node, pattern)),
            internals=tuple(f"{key}.{name}" for name in pattern.internals),
            output=key_of(fused_output(found[0])),
            macs=pattern.macs(positional(node), node),
            weight_shape=_weight_shape(matrices),
            fused_output=(
                "" if pattern.output is None else key_of(fused_output(found[0], pattern.output))
            ),
            result=key_of(found[0]),
            smoothable=pattern.smoothable and _keeps_channels(operands(node, pattern)[0]),
            channels=_channels(pattern, node),
            repeatable=pattern.smoothable and _is_repeatable(operands(node, pattern)[0]),
            picks=node in picking,
            window=_window(pattern, node),
        )
        yield node, pattern, site
