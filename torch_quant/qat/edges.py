"""The first and the last layers of a model, which few bits hurt most.

They are kept at 8 bits where the rest has fewer, as in Zhou et al. 2016, "DoReFa-Net: Training Low
Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients", section 2.7, and in Esser et
al. 2020. They take a small share of the multiplications.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from torch_quant.config import QConfig
from torch_quant.core.elements import IntegerType
from torch_quant.core.plan import QuantPlan
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.graph.rules import modules_of, rules_for
from torch_quant.graph.sites import Site, find_sites
from torch_quant.ops.table import OPERATORS
from torch_quant.session import Session

__all__ = ["edge_configs", "edges_of", "finer_edges"]


def finer_edges(session: Session, plan: QuantPlan) -> list[str]:
    """The first and last layers that have more bits than some other layer."""

    def bits(name: str) -> int:
        return min(_bits(plan[name].weight), _bits(plan[name].activation))

    edges = [name for name in edges_of(session) if name in plan and plan[name].quantized]
    rest = [bits(name) for name in plan.quantized if name not in edges]
    return [name for name in edges if rest and bits(name) > min(rest)]


def _bits(spec: QuantSpec | None) -> int:
    """Of an integer format; more than any where it is none."""
    return spec.bits if spec is not None and isinstance(spec.element, IntegerType) else 64


def _of_graph(graph: fx.Graph) -> list[str]:
    """Sites with a weight in a graph that no other comes before, and those that none follows."""
    weighted = {
        node: site.name for node, pattern, site in find_sites(graph) if pattern.weight is not None
    }
    found: dict[str, None] = {}
    for nodes, neighbours in (
        (list(graph.nodes), lambda node: node.all_input_nodes),
        (list(reversed(graph.nodes)), lambda node: list(node.users)),
    ):
        beyond: set[fx.Node] = set()
        for node in nodes:
            if any(each in beyond or each in weighted for each in neighbours(node)):
                beyond.add(node)
        found |= dict.fromkeys(weighted[node] for node in weighted if node not in beyond)
    return list(found)


def edges_of(session: Session) -> list[str]:
    """The first and last sites with a weight.

    A model that is one graph may have several of both. Of one in pieces, they are the first and
    the last that ran.
    """
    captured, root = session.captured, session.captured.root
    if root.graphs and not (root.failure or root.plain):
        prepared = [captured.prepared(root, graph) for _, graph in root.graphs]
        found = [name for each in prepared for name in _of_graph(each.canonical.graph)]
    else:
        names = [site.name for site, _ in captured.sites() if OPERATORS[site.op].weight is not None]
        found = [*names[:1], *names[-1:]]
    return list(dict.fromkeys(found))


def edge_configs(session: Session, plan: QuantPlan, bits: int) -> dict[str, QConfig]:
    """Configurations with ``bits`` for the first and last layers that would have fewer.

    Those that an override names stay as the user has them, and so do all where nothing else has
    fewer bits.

    Args:
        session: the quantizer and the model.
        plan: what would be done with each site.
        bits: of their integer formats.

    Raises:
        InvalidConfig: ``bits`` is out of range.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise InvalidConfig(
            f"edge_bits={bits!r}; expected 2 to 8, or None to leave them as planned"
        )

    def fewer(name: str) -> bool:
        site = plan[name]
        return site.quantized and min(_bits(site.weight), _bits(site.activation)) < bits

    edges = [name for name in edges_of(session) if fewer(name)]
    if not edges or all(name in edges for name in plan if fewer(name)):
        return {}
    settings, kernels = session.settings, session.owner.backend.kernels()
    sites: dict[str, Site] = {site.name: site for site, _ in session.captured.sites()}
    found = {}
    for name in edges:
        modules = modules_of(session.model, sites[name])
        given = rules_for(sites[name], modules, settings.overrides)
        entry = plan[name]
        activation, weight = (
            replace(spec, element=QuantSpec.of(bits=bits, signed=spec.signed).element)
            if spec is not None and _bits(spec) < bits
            else spec
            for spec in (entry.activation, entry.weight)
        )
        config = replace(
            settings.qconfig,
            input=activation or settings.qconfig.input,
            weight=weight or settings.qconfig.weight,
        )
        if not given and kernels.choose(entry.op, config.input, config.weight)[0] is not None:
            found[name] = config
    return found
