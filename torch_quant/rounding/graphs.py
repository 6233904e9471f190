"""Round the weights of a captured graph a segment at a time, on what the rounded ones before give.

Each segment learns to give what the float model gives there, for inputs that are those of the
quantized model: activations are rounded too. What an error counts is the square of the gradient
that the model's outputs have there: Li et al., "BRECQ: Pushing the Limit of Post-Training
Quantization by Block Reconstruction", 2021, section 3.3, with a random sum of the outputs in the
place of a loss.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.algorithms.blocks import Layer
from torch_quant.core.memory import give_back
from torch_quant.core.metrics import float_leaves, sqnr
from torch_quant.core.plan import QuantPlan
from torch_quant.core.rounded import RoundedWeight, RoundedWeights
from torch_quant.errors import InvalidConfig, QuantError
from torch_quant.graph.calls import Call
from torch_quant.graph.examples import example_call
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.progress import hidden
from torch_quant.graph.sites import KEY, Site
from torch_quant.passes.prepare import Prepared
from torch_quant.rounding.driver import round_layers
from torch_quant.rounding.report import BlockError, Rounding
from torch_quant.rounding.rows import SegmentBlock, rows_of
from torch_quant.rounding.segments import Segment, joined, segments_of
from torch_quant.rounding.simulation import Learned, Simulation
from torch_quant.session import Session

__all__ = ["learned_sites", "round_graph"]

logger = logging.getLogger("torch_quant")

_MOST = 4
"""Layers up to which neighbours are one segment."""
_BYTES = 2**30
"""Of the float model's tensors between segments, and of what their errors count."""


def learned_sites(session: Session, plan: QuantPlan) -> frozenset[str]:
    """The sites whose weights are rounded in the graph; none where modules are blocks.

    That is for methods that work on blocks, where activations are quantized or layers are
    convolutions.

    Args:
        session: of the model.
        plan: of it.

    Raises:
        InvalidConfig: a site has a transform that scales blocks, which graphs do not have.
    """
    if session.captured.root.by_choice:
        return frozenset()
    found = [
        site
        for site in plan.values()
        if site.quantized and site.weight and site.method and site.method.wants_blocks
    ]
    if all(site.op == "linear" and not site.needs_ranges for site in found):
        return frozenset()
    for site in plan.values():
        if late := [each for each in site.transforms if each.wants_blocks and site.quantized]:
            raise InvalidConfig(
                f"{site.name}: {late[0]} scales blocks of modules, and weights of this model are "
                f"rounded in its graph, {found[0].name} by {found[0].method}: leave {late[0].name} "
                "out, or take a transform that goes by what calibration records"
            )
    return frozenset(site.name for site in found)


def round_graph(
    session: Session,
    plan: QuantPlan,
    learned: frozenset[str],
    batches: Sequence[Any],
    *,
    show_progress: bool = True,
) -> tuple[RoundedWeights, Rounding]:
    """The codes of the weights that are learned, and a report.

    Args:
        session: the quantizer and the model, which was calibrated.
        plan: of the model on the quantizer's backend.
        learned: the sites.
        batches: inputs, each as ``example_inputs`` of :meth:`Quantizer.calib`.
        show_progress: show a bar on stderr.

    Raises:
        InvalidConfig: there are no batches; the model is no one graph, or they need several.
        NotCalibrated: ranges are missing.
        QuantError: a weight cannot be rounded, names the segment; a batch gives NaN.
    """
    from tqdm import tqdm

    graph, calls = _calls(session, batches)
    run = _Run(session, plan, session.captured.prepared(session.captured.root, graph), learned)
    total = len(calls) + len(run.segments)
    with tqdm(total=total, desc="rounding weights", unit="block", disable=hidden(show_progress),
              delay=2.0, leave=False) as bar:  # fmt: skip
        chunks = run.chunks(calls, bar)
        divisible = all(_divisible(graph, call) for call in calls)
        for number, segment in enumerate(run.segments):
            bar.set_postfix_str(segment.name, refresh=False)
            run.segment(number, segment, chunks, divisible)
            bar.update(1)
    if missed := sorted(learned - run.made.sites.keys() - run.shared):
        run.made.left_out = tuple(missed)
        logger.warning(
            "%d weights are in no graph of the calls that were given; they are rounded to nearest: "
            "%s%s", len(missed), ", ".join(missed[:3]), ", ..." if len(missed) > 3 else "",
        )  # fmt: skip
    return run.made, Rounding(tuple(run.errors))


def _calls(session: Session, batches: Sequence[Any]) -> tuple[CapturedGraph, list[Call]]:
    """The graph that serves the batches, and they as it takes them."""
    if not batches:
        raise InvalidConfig("round_weights got no batches; give an iterable of inputs of the model")
    root = session.captured.root
    graphs, calls = list[CapturedGraph](), list[Call]()
    for number, batch in enumerate(batches):
        found = root.resolve(*example_call(batch))
        if found is None or root.plain or root.state:
            why = root.failure or "it keeps something between its calls"
            raise InvalidConfig(
                "weights that go with quantized activations are rounded in the graph of the whole "
                f"model, and this one has none ({why}): take GPTQ(), which goes by what "
                "calibration records"
            )
        calls.append(found[0])
        if empty := [tuple(x.shape) for x in found[0].tensors if not x.numel()]:
            raise InvalidConfig(
                f"round_weights: batch {number} is empty: an input has shape {empty[0]}; leave it "
                "out"
            )
        graphs.append(found[1])
        if graphs[-1] is not graphs[0]:
            raise InvalidConfig(
                f"round_weights: batch {number} is a call of another kind or size than batch 0, "
                "which another graph serves; give batches of one kind"
            )
    return graphs[0], calls


def _divisible(graph: CapturedGraph, call: Call) -> bool:
    """Whether a graph takes any number of the rows of a call."""
    rows = rows_of(call.tensors)
    if any(not x.dim() or len(x) != rows for x in call.tensors):
        return False
    tried = (tuple(torch.cat([x, x])[:n] for x in call.tensors) for n in {1, 2, rows + 1})
    return all(graph.contract.mismatch(call.with_tensors(each)) is None for each in tried)


@dataclass
class _Chunk:
    """One batch on its way through the segments.

    Args:
        inputs: what the graph takes.
        targets: what the float model gives at the end of each segment; None behind that.
        importance: what an error counts there; None for 1.
        before: what the segment before has given.
    """

    inputs: tuple[Tensor, ...]
    targets: list[Tensor | None]
    importance: list[Tensor | None]
    before: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of what is kept of the float model."""
        return sum(x.nbytes for x in (*self.targets, *self.importance) if x is not None)

    def args(self, segment: Segment) -> tuple[Tensor, ...]:
        """The arguments of a segment."""
        given = tuple(self.inputs[i] for i in segment.inputs)
        if segment.first:
            return given
        assert self.before is not None
        return (self.before, *given)


class _Run:
    """One pass through a graph.

    Args:
        session: the quantizer and the model.
        plan: of the model.
        prepared: the graph.
        learned: sites whose weights are learned.
    """

    def __init__(
        self, session: Session, plan: QuantPlan, prepared: Prepared, learned: frozenset[str]
    ) -> None:
        simulation = Simulation(session, plan, session.owner.backend.kernels(), learned)
        with torch.no_grad():
            lowered = simulation.graph(prepared.canonical)
        self.plan, self.weights = plan, simulation.weights
        self.sites = {site.name: site for site, _ in prepared.sites}
        nodes = prepared.canonical.graph.nodes
        known = {str(node.meta[KEY]) for node in nodes if KEY in node.meta}
        self.segments = segments_of(lowered, known, self.weights, _MOST)
        mine = {site for segment in self.segments for site in segment.learned}
        self.shared = self.weights.keys() - mine
        """Sites that are further calls of others."""
        methods = {plan[site].method for site in mine}
        self.weighted = all(each is not None and each.wants_importance for each in methods)
        self.float_graph = _Float(
            prepared.canonical, [segment.key for segment in self.segments], self.weighted
        )
        self.made, self.errors = RoundedWeights(), list[BlockError]()

    def chunks(self, calls: Sequence[Call], bar: Any) -> list[_Chunk]:
        """As many batches as there is memory for."""
        generator, found, total = torch.Generator().manual_seed(0), list[_Chunk](), 0
        for number, call in enumerate(calls):
            chunk = self.float_graph.chunk(number, call, generator)
            total += chunk.nbytes
            if found and total > _BYTES:
                logger.warning(
                    "round_weights goes by %d of %d batches, of which it keeps %d MB; give fewer, "
                    "or smaller ones", number, len(calls), _BYTES >> 20,
                )  # fmt: skip
                bar.update(len(calls) - number)
                break
            found.append(chunk)
            bar.update(1)
        for place in range(len(self.segments)):
            _scale(found, place)
        return found

    def segment(
        self, number: int, segment: Segment, chunks: Sequence[_Chunk], divisible: bool
    ) -> None:
        """Round the weights of one segment, and send the batches through it."""
        start = time.monotonic()
        layers = tuple(
            self._layer(self.sites[site], self.weights[site], module)
            for site, module in segment.learned.items()
        )
        given = [chunk.args(segment) for chunk in chunks]
        targets = [x for chunk in chunks if (x := chunk.targets[number]) is not None]
        importance = [x for chunk in chunks if (x := chunk.importance[number]) is not None]
        rows = [rows_of(chunk.inputs) for chunk in chunks] if divisible else None
        block = SegmentBlock.of(segment, layers, given, targets, importance or None, rows)
        first = chunks[0].args(segment)
        with torch.no_grad():
            exact = segment.module(*first)
            round_layers(block)
            for layer in layers:
                assert layer.rounded is not None
                self.made.sites[layer.site] = RoundedWeight.of(
                    *layer.rounded, layer.method, self.weights[layer.site].checksum
                )
            made = segment.module(*first)
            same = bool(layers) and made.shape == exact.shape
            error = sqnr(exact, made) if same else float("nan")
            for chunk in chunks:
                chunk.before = segment.module(*chunk.args(segment))
                chunk.targets[number] = chunk.importance[number] = None
        names = tuple(dict.fromkeys(layer.method.name for layer in layers))
        sites = tuple(layer.site for layer in layers)
        seconds = time.monotonic() - start
        self.errors.append(BlockError(segment.name, sites, names, error, seconds))
        give_back()

    def _layer(self, site: Site, learned: Learned, module: Any) -> Layer:
        method = self.plan[site.name].method
        assert method is not None
        return Layer(site.name, site.name, module, learned.spec, method, (), site)


def _scale(chunks: Sequence[_Chunk], place: int) -> None:
    """Have errors count 1 on average; the same each where that is not known of all batches."""
    known = [x for chunk in chunks if (x := chunk.importance[place]) is not None]
    mean = sum(float(x.float().mean()) for x in known) / max(1, len(known))
    usable = len(known) == len(chunks) and 0 < mean < float("inf")
    for chunk in chunks:
        x = chunk.importance[place]
        chunk.importance[place] = x / mean if usable and x is not None else None


class _Float(fx.Interpreter):
    """The float graph, which keeps some of its tensors.

    Args:
        gm: the canonical graph.
        keys: of the tensors, in their order; empty for the outputs.
        weighted: whether to find what errors count.
    """

    def __init__(self, gm: fx.GraphModule, keys: Sequence[str], weighted: bool) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.keys, self.weighted = list(keys), weighted
        self.seen: dict[str, Tensor] = {}
        """Of the call that runs; empty between calls, as these are large."""

    def run_node(self, n: fx.Node) -> Any:
        """One node; what is kept can be asked for a gradient."""
        value, key = super().run_node(n), n.meta.get(KEY)
        if key and key in self.keys and key not in self.seen and isinstance(value, Tensor):
            if self.weighted and value.is_floating_point() and not value.requires_grad:
                value = value.detach().requires_grad_()
            self.seen[key] = value
        return value

    def fetch_attr(self, target: str) -> Any:
        """A tensor of the model, through which gradients pass."""
        value = super().fetch_attr(target)
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    def chunk(self, number: int, call: Call, generator: torch.Generator) -> _Chunk:
        """What is known of one batch."""
        inputs = tuple(x.detach() for x in call.tensors)
        with torch.set_grad_enabled(self.weighted):
            given = self.run(*(x.clone() for x in inputs))
            outputs = joined(given)
        if any(bool(x.isnan().any()) for x in float_leaves((inputs, given))):
            raise QuantError(
                f"round_weights: batch {number} holds NaN, or the float model gives NaN for it; "
                "leave it out"
            )
        importance = self._gradients(outputs, generator) if outputs.requires_grad else {}
        gradients = map(importance.get, self.keys)
        counts = [None if x is None else x.square().to(torch.bfloat16) for x in gradients]
        targets = [self.seen[key] if key else outputs for key in self.keys]
        self.seen, self.env = {}, {}
        return _Chunk(inputs, [x.detach() for x in targets], counts)

    def _gradients(
        self, outputs: Tensor, generator: torch.Generator
    ) -> Mapping[str, Tensor | None]:
        """Of a random sum of the outputs, at what was kept; none where an operator has none."""
        if not self.seen:
            return {}
        signs = torch.randint(0, 2, outputs.shape, generator=generator) * 2 - 1
        try:
            found = torch.autograd.grad(
                (outputs * signs.to(outputs)).sum(), list(self.seen.values()), allow_unused=True
            )
        except RuntimeError as error:
            logger.warning("round_weights: all errors count alike, no gradient: %s", error)
            return {}
        return dict(zip(self.seen, found, strict=True))
