"""From one module and one call to a flat ATen graph, by ``torch.export``, and checked."""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torch_quant.errors import CaptureFailed
from torch_quant.graph.budget import Freedom
from torch_quant.graph.calls import Call, identifiers
from torch_quant.graph.effects import KeepsState
from torch_quant.graph.foreign import foreign_operators
from torch_quant.graph.forgetting import forgotten
from torch_quant.graph.macs import note_sizes
from torch_quant.graph.numbers import check_numbers
from torch_quant.graph.outputs import flatten_output, unflatten_output
from torch_quant.graph.progress import Progress, progress
from torch_quant.graph.reasons import about_images, first_lines, reason_of
from torch_quant.graph.running import (
    CAPTURING,
    Writes,
    copied,
    first_run,
    frozen,
    no_fastpath,
    written,
)
from torch_quant.graph.sealed import ConstantRead
from torch_quant.graph.shapes import ShapeContract
from torch_quant.graph.verification import (
    batch_size,
    exact_unmasked,
    masked,
    other_sizes,
    repeat,
    takes_another_path,
    try_size_one,
    verify,
    verify_other,
)
from torch_quant.ops.capturing import exporting, restore_operators

__all__ = [
    "CapturedGraph",
    "ModelRefuses",
    "NumbersUntried",
    "export_graph",
    "size_oblivious",
    "verify",
]

logger = logging.getLogger("torch_quant")

_INNER = "captured"
_EXPORT_LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch._export.non_strict_utils")
_DROPPED = ("_guards_fn", "_assert_tensor_metadata", "_assert_scalar", "_assert_async")


class ModelRefuses(CaptureFailed):
    """The float model raises on this call; there is nothing to capture."""


class NumbersUntried(CaptureFailed):
    """Other numbers cannot be tried on the module, so the call's own are to be constants."""


@dataclass
class CapturedGraph:
    """A module's computation for one kind of call.

    Args:
        gm: tensors in, flat output leaves out; holds the module's own parameters and buffers.
        contract: which input shapes it serves.
        out_spec: how the leaves form the module's output.
        exact: it gave the module's output bit for bit, not only up to rounding. (Some models take
            another, equivalent path while being exported: a mask where eager code asks for causal.)
        writes: the arguments that the module changes.
        leaves_behind: attributes that its calls write and never read, as ``child.attribute``.
        reduced: not every size could be left free in the time there is.
    """

    gm: fx.GraphModule
    contract: ShapeContract
    out_spec: Any
    exact: bool = True
    writes: Writes = ()
    leaves_behind: tuple[str, ...] = ()
    reduced: bool = False

    def __call__(self, call: Call) -> Any:
        return self.output(self.gm(*call.tensors), call)

    def output(self, leaves: Any, call: Call) -> Any:
        """The module's output from the graph's; arguments that it changes are changed."""
        return unflatten_output(leaves, self.out_spec, call.source, call.constant)


class _Flat(nn.Module):
    """``module`` seen as a function of tensors only, returning flat leaves."""

    def __init__(
        self, module: nn.Module, call: Call, writes: Writes, record: Callable[[Any], None]
    ) -> None:
        super().__init__()
        self.add_module(_INNER, module)
        self._call, self._writes, self._record = call, writes, record

    def forward(self, *tensors: Tensor) -> list[Any]:
        args, kwargs = self._call.rebuild(tensors, sealed=True)
        output = getattr(self, _INNER)(*args, **kwargs)
        symbols = self._call.uses.symbols
        leaves, spec = flatten_output(output, written(args, kwargs, self._writes), symbols)
        self._record(spec)
        return leaves


def export_graph(
    module: nn.Module,
    call: Call,
    earlier: Sequence[CapturedGraph] = (),
    *,
    path: str = "",
    free: Sequence[frozenset[int]] | None = None,
) -> CapturedGraph:
    """Capture ``module`` (a twin, in eval mode) for calls like ``call``.

    Every dimension of every tensor is asked to be dynamic. A graph that fixes the batch size of a
    batch-1 example is captured again from the example repeated to batch 2. Each attempt must
    reproduce the module's output on ``call``; the first that also does so on another batch size
    wins. Where symbolic sizes take too long, fewer of them stay free, with a warning.

    Args:
        module: what to capture.
        call: the example.
        earlier: the module's graphs for calls of this kind, none of which serves ``call``. Where
            not all sizes can be free, those in which it differs from them are tried.
        path: of the module in the whole model.
        free: the dimensions of each tensor that may be free; None for all.

    Raises:
        ModelRefuses: the float module raises on ``call``.
        KeepsState: the module reads what an earlier call of it left in an attribute.
        CaptureFailed: no attempt gave the module's output, or only for the example's batch size
            though the module serves others and has parts that could be captured instead.
    """
    if len(call.tensors) == len(call.numbers):
        raise CaptureFailed("the call has no tensor input, so there is nothing to capture")
    with CAPTURING, forgotten():
        contracts = [graph.contract for graph in earlier]
        reduced = any(graph.reduced for graph in earlier)
        with progress(path or "the model") as shown:
            freedom = Freedom(call, contracts, reduced, free, adjustable=not path, shown=shown)
            graph = _first_that_serves(module, call, freedom, shown)
        graph.reduced = freedom.reduced
        return graph


def _first_that_serves(
    module: nn.Module, call: Call, freedom: Freedom, shown: Progress
) -> CapturedGraph:
    try:
        expected, writes, left = first_run(module, call)
    except KeepsState:
        raise
    except Exception as error:  # whatever the model raises
        raise ModelRefuses(
            f"the float model itself fails on these inputs "
            f"({', '.join(call.describe())}): {type(error).__name__}: {first_lines(error)}"
            f"{about_images(zip(call.names(), call.tensors, strict=True))}"
        ) from error
    others: list[tuple[Call, list[Any]]] | None = None
    best: CapturedGraph | None = None
    reasons: list[tuple[str, Exception]] = []
    twice = repeat(call, 2) if batch_size(call) == 1 else call
    attempts = [(call, "oblivious"), (twice, "oblivious"), (twice, "dynamic"), (call, "static")]
    for example, mode in dict.fromkeys(attempts):
        try:
            if mode == "static":
                shown.say("with every size fixed")
            free = freedom if mode != "static" else None
            graph = _export(module, example, mode, writes, free)
            graph.leaves_behind = left
            shown.say("comparing it with the module")
            graph.contract = graph.contract.allowing(call)
            graph.exact = verify(graph, call, expected)
            with frozen(graph.gm):
                note_sizes(graph.gm, copied(call).tensors)
        except Exception as error:  # torch.export raises errors of many unrelated classes
            reasons.append((reason_of(error), error))
            data = type(error).__name__ == "GuardOnDataDependentSymNode"
            if data or isinstance(error, ConstantRead):
                break  # the same for every shape
            logger.debug("capture, %s: %s", mode, reasons[-1][0], exc_info=True)
            continue
        if foreign := foreign_operators(graph.gm):
            # They may read out of bounds where inputs do not belong together.
            if call.numbers:
                names = ", ".join(foreign)
                raise NumbersUntried(f"{names} may read out of bounds with other numbers")
            graph.contract = graph.contract.like(call)
            graph.exact &= not masked(call)
            return graph
        graph.exact = graph.exact and exact_unmasked(module, graph, call)
        try:
            if others is None:  # only now, as code that no graph can hold need not check either
                others = other_sizes(module, call, writes) if freedom.batch else []
            for other, output in others:
                verify_other(graph, other, output)
            try_size_one(module, graph, call)
            return graph
        except Exception as error:  # a wrong size may fail in any operator
            logger.debug("captured, but not for another batch size: %s", error)
            best = best or graph
    if best is None:
        raise CaptureFailed(reasons[0][0]).leaving(left) from reasons[0][1]
    paths = all(takes_another_path(best, other) for other, _ in others or [])
    if any(True for _ in module.children()) and not paths:
        raise CaptureFailed(
            f"as one graph it serves only {best.contract.describe()}; its parts may serve more"
        ).leaving(left)
    try_size_one(module, best, call)
    return best


def size_oblivious(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Export without taking a dimension of size 1 for a constant, if ``wanted``."""
    from torch.fx.experimental import _config as fx_config

    if not wanted:
        return contextlib.nullcontext()
    patch: contextlib.AbstractContextManager[Any]
    patch = fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patch


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """An attempt that fails is not the user's business: no warnings, no graph dumps on stderr."""
    loggers = [logging.getLogger(name) for name in _EXPORT_LOGGERS]
    disabled = [each.disabled for each in loggers]
    for each in loggers:
        each.disabled = True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, before in zip(loggers, disabled, strict=True):
            each.disabled = before


def _export(
    module: nn.Module, example: Call, mode: str, writes: Writes, freedom: Freedom | None
) -> CapturedGraph:
    # Imported here: with sympy behind it, it takes longer than all the rest of the package.
    from torch.export import Dim, ExportedProgram

    out_specs: list[Any] = []
    flat = _Flat(module, example, writes, out_specs.append)

    def export(free: list[frozenset[int]]) -> ExportedProgram:
        shapes = tuple(dict.fromkeys(sorted(axes), Dim.AUTO) or None for axes in free)
        with (
            frozen(module),
            exporting(),
            no_fastpath(),
            _quiet(),
            size_oblivious(mode == "oblivious"),
        ):
            return torch.export.export(
                flat,
                copied(example).tensors,
                dynamic_shapes={"tensors": shapes} if freedom else None,
                strict=False,
            )

    program = freedom.attempt(export) if freedom else export([])
    exported = program.module()
    if example.numbers:
        check_numbers(exported.graph)
    contract = ShapeContract.of(exported, example)
    gm = _plain(exported, contract.names)
    return CapturedGraph(gm, contract, out_specs[-1], writes=writes)


def _plain(exported: fx.GraphModule, names: list[str]) -> fx.GraphModule:
    """The exported graph without its wrapper, checks, guards and calling convention.

    Its inputs are called ``names``, as far as Python allows that.
    """
    attributes: dict[str, Any] = {}
    graph = exported.graph
    inputs = list(graph.find_nodes(op="placeholder"))
    taken = {node.name for node in inputs}
    for node, name in zip(inputs, identifiers(names, taken), strict=True):
        node.target = name
    for node in list(graph.nodes):
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(exported)
            node.target = str(node.target).removeprefix(f"{_INNER}.")
            attributes[node.target] = value
        elif any(name in str(node.target) for name in _DROPPED):
            node.replace_all_uses_with(None)
            graph.erase_node(node)
    subgraphs = [x.graph for x in attributes.values() if isinstance(x, fx.GraphModule)]
    for node in (node for each in (graph, *subgraphs) for node in each.nodes):
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {
                key: (path.removeprefix(_INNER).removeprefix("."), cls)
                for key, (path, cls) in stack.items()
                if path
            }
    restore_operators(graph)
    graph.set_codegen(fx.graph.CodeGen())
    output = next(iter(reversed(graph.nodes)))
    output.args = (tuple(pytree.tree_leaves(output.args, is_leaf=lambda x: x is None)),)
    gm = fx.GraphModule(attributes, graph)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm
