"""The bodies of a graph that trains: with dropout, with norms that move, observing, in float.

What is deployed is the mode None. Each other mode has a body of its own, so that compilers which
have seen both need not compile again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx

from torch_quant.convert.mounting import linked, links
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.graph.sites import MODULE
from torch_quant.passes.base import copy_graph
from torch_quant.passes.fold_batch_norm import FoldedNorm
from torch_quant.qat.batch_norm import OwnerOf, let_move, norms_of
from torch_quant.qat.dropout import dropouts, turn_on
from torch_quant.qat.fake_quantize import TRAINED_FAKE_QUANTIZE
from torch_quant.qat.observing import observe_ranges
from torch_quant.qat.refolding import unite_folds
from torch_quant.qat.tables import unrounded
from torch_quant.qat.watching import insert_taps, insert_watches

__all__ = ["Mode", "TrainedGraph", "results_of", "set_mode"]


@dataclass(frozen=True)
class Mode:
    """How a body differs from the one that is deployed.

    Args:
        drops: whether dropout drops.
        moving: the norms whose statistics move, named as by ``norms_of``, and the momentum of each.
        observes: whether scales follow the data.
        rounds: whether anything is rounded.
        watches: whether the first value that is not finite raises.
        taps: modules whose results are recorded.
    """

    drops: bool = False
    moving: tuple[tuple[str, float | None], ...] = ()
    observes: bool = False
    rounds: bool = True
    watches: bool = False
    taps: tuple[str, ...] = ()

    def but_for_momenta(self) -> Mode:
        """What is the same for modes that differ in the momenta of norms alone.

        >>> Mode(moving=(("bn", 0.1),)).but_for_momenta().moving
        (('bn', None),)
        """
        return replace(self, moving=tuple((name, None) for name, _ in self.moving))


class TrainedGraph(QuantizedGraph):
    """A graph with a body for each mode."""

    folded: tuple[FoldedNorm, ...] = ()
    """The norms that were folded into products in it."""
    path: str = ""
    """Of the module that it computes, in the model."""
    results: Mapping[str, str] = {}
    """Path of each module -> the node that computes its result."""
    facts: Mapping[str, tuple[Hashable, ...]] = {}
    """Name of each constant that transforms have computed in it -> what ``Params.kept`` calls it.

    Copies have it, which the notes on nodes would not be in.
    """
    _norms: dict[str, str] | None = None
    _drops: bool | None = None

    @classmethod
    def over(cls, graph: QuantizedGraph) -> TrainedGraph:
        """The same graph."""
        return cls(graph.body, graph.kind, graph.contract, graph.out_spec)

    @property
    def deployed(self) -> fx.GraphModule:
        """The body of mode None."""
        return self.modes.get(None, self.body)

    @property
    def norms(self) -> dict[str, str]:
        """Each norm whose statistics can move -> the name of its mean in the graph."""
        if self._norms is None:
            self._norms = norms_of(self.deployed, self.folded)
        return self._norms

    @property
    def drops(self) -> bool:
        """Whether it has a dropout."""
        if self._drops is None:
            self._drops = bool(dropouts(self.deployed))
        return self._drops


def results_of(graph: fx.Graph, path: str, folded: Iterable[FoldedNorm]) -> dict[str, str]:
    """Path of each module that computes something in a graph -> the last node of it.

    Args:
        graph: lowered.
        path: of its module in the model.
        folded: the norms in it; the result of such a norm is that of its product.
    """
    found: dict[str, str] = {}
    means = {node.name: str(node.target) for node in graph.find_nodes(op="get_attr")}
    for norm in folded:
        owner = means[norm.mean].rpartition(".")[0]
        found[f"{path}.{owner}".strip(".")] = norm.product
    for node in graph.nodes:
        module = node.meta.get(MODULE, "")
        while module:
            found[module] = node.name
            module = module.rpartition(".")[0]
    return found


def set_mode(
    graph: TrainedGraph,
    mode: Mode,
    owner_of: OwnerOf,
    record: Callable[[str, Tensor], None],
) -> None:
    """Have a graph run the body of ``mode``.

    Args:
        graph: the graph.
        mode: what is not in the graph has no effect.
        owner_of: the module that holds a tensor, by its name in the graph.
        record: is given each module of ``mode.taps`` and its result.
    """
    key = None if mode == Mode() else mode
    if graph.mode == key:
        return
    graph.modes[graph.mode] = graph.body
    if key not in graph.modes:
        deployed, kind = graph.modes[None], mode.but_for_momenta()
        for other in [
            x for x in graph.modes if isinstance(x, Mode) and x.but_for_momenta() == kind
        ]:
            del graph.modes[other]  # a momentum that is scheduled has one body, not many
        body = linked(copy_graph(deployed), links(deployed))
        if mode.drops:
            turn_on(body)
        insert_taps(body, {x: graph.results[x] for x in mode.taps if x in graph.results}, record)
        let_move(body, graph.folded, dict(mode.moving), owner_of)
        if mode.observes:
            observe_ranges(body)
        if not mode.rounds:
            _leave_unrounded(body)
        if mode.watches:
            insert_watches(body, graph.path)
        else:
            unite_folds(body)
        body.graph.eliminate_dead_code()
        _shorten_names(body)
        body.recompile()
        graph.modes[key] = body
    graph.body, graph.mode = graph.modes[key], key


def _shorten_names(body: fx.GraphModule) -> None:
    """Have a body read tensors of a module below by one step in Python instead of one for each dot.

    Bodies of modes are made anew for every copy, so the shortcuts are in no state.
    """
    shortcuts: dict[str, str] = {}
    for node in body.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        if not path:
            continue
        if path not in shortcuts:
            shortcuts[path] = f"_owner_{len(shortcuts)}"
            body.__dict__[shortcuts[path]] = body.get_submodule(path)  # none of its submodules
        node.target = f"{shortcuts[path]}.{name}"


def _leave_unrounded(body: fx.GraphModule) -> None:
    for node in body.graph.find_nodes(op="call_function", target=TRAINED_FAKE_QUANTIZE):
        node.replace_all_uses_with(unrounded(node))
