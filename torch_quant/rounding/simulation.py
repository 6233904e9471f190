"""A graph in float arithmetic, through whose rounding of activations a gradient passes.

It is what the quantized graph will be, transforms included, but for the weights that are learned:
these are float, and each layer that has one is marked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx

from torch_quant.algorithms import without_data
from torch_quant.calibrated import Calibrated
from torch_quant.convert.lowering import Lowering
from torch_quant.core.elements import element_type
from torch_quant.core.functional import dequantize_blocks
from torch_quant.core.kernels import KernelTable
from torch_quant.core.plan import QuantPlan
from torch_quant.core.qparams import QParams
from torch_quant.core.rounded import checksum
from torch_quant.core.spec import QuantSpec
from torch_quant.graph.sites import KEY
from torch_quant.ops.arguments import argument, arguments
from torch_quant.ops.qdq import DEQUANTIZE, FAKE_QUANTIZE, QUANTIZE
from torch_quant.passes.base import PassContext
from torch_quant.passes.constants import evaluate, new_constant
from torch_quant.session import Session

__all__ = ["LEARNED", "Learned", "Simulation", "straight_through"]

LEARNED = "torch_quant_learned"
"""Entry of ``node.meta`` of a layer: the site whose weight is learned."""

V = TypeVar("V")


class _StraightThrough(torch.autograd.Function):
    """Rounds; the gradient passes inside of the range, and not where values are clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, element: str) -> Tensor:
        ctx.ends = None
        if not scale.dim():
            kind = element_type(element)
            low, high = (
                float((end - zero_point) * scale) for end in (kind.quant_min, kind.quant_max)
            )
            half = float(scale) / 2  # what is rounded to an end lies inside
            ctx.ends = low - half, high + half
            ctx.save_for_backward(x)
        rounded: Tensor = FAKE_QUANTIZE(x, scale, zero_point, element)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if ctx.ends is not None:
            (x,) = ctx.saved_tensors
            grad = torch.ops.aten.hardtanh_backward(grad, x, *ctx.ends)
        return grad, None, None, None


def straight_through(x: Tensor, scale: Tensor, zero_point: Tensor, element: str) -> Tensor:
    """Quantize and dequantize, with a gradient.

    >>> x = torch.tensor([0.4, 300.0], requires_grad=True)
    >>> with torch.enable_grad():
    ...     rounded = straight_through(x, torch.tensor(1.0), torch.tensor(0), "uint8")
    >>> rounded.sum().backward()
    >>> rounded.tolist(), x.grad.tolist()
    ([0.0, 255.0], [1.0, 0.0])
    """
    found: Tensor = _StraightThrough.apply(x, scale, zero_point, element)
    return found


@dataclass(frozen=True)
class Learned:
    """A weight that is learned.

    Args:
        weight: in float, as its operator takes it, behind all transforms.
        spec: the format, its granularity bound to the axis of the output channels.
        checksum: of the weight as the model has it.
    """

    weight: Tensor
    spec: QuantSpec
    checksum: int


class _Params(Calibrated):
    """Scales from calibration; weights that are learned are noted.

    Args:
        session: has the ranges.
        plan: of the graph.
        learned: sites whose weights are.
    """

    def __init__(self, session: Session, plan: QuantPlan, learned: Iterable[str]) -> None:
        super().__init__(session, plan, rounded=False)
        self.learned, self.found = frozenset(learned), dict[str, Learned]()

    def weight(
        self, site: str, weight: Tensor, spec: QuantSpec, axis: int
    ) -> tuple[Tensor, QParams]:
        """Of a site's weight; one that is learned has any codes for now."""
        if site not in self.learned:
            return super().weight(site, weight, spec, axis)
        bound = spec.on(axis)
        self.found[site] = Learned(weight.detach().float().clone(), bound, checksum(weight))
        return without_data(None).quantize(weight, bound, {})


@dataclass
class Simulation:
    """Lowers graphs of one model; see the top of the file.

    Args:
        session: the quantizer and the model.
        plan: of the model, on the backend for which weights are rounded.
        kernels: of that backend.
        learned: sites whose weights are learned.
    """

    name: ClassVar[str] = "simulation"
    compiles: ClassVar[bool] = False
    fixes_numbers: ClassVar[bool] = False
    not_recorded: ClassVar[str] = ""

    session: Session
    plan: QuantPlan
    table: KernelTable
    learned: frozenset[str]
    weights: dict[str, Learned] = field(default_factory=dict)
    """Of the sites that were found in graphs."""

    def graph(self, canonical: fx.GraphModule) -> fx.GraphModule:
        """A canonical graph, lowered."""
        plan = QuantPlan(
            [
                # What goes by the codes of weights has to wait for them.
                replace(site, transforms=tuple(x for x in site.transforms if not x.last))
                for site in self.plan.values()
            ],
            self.plan.float_ops,
        )
        params = _Params(self.session, plan, self.learned)
        gm = Lowering(self.session.captured, plan, self, params).graph(canonical)
        self.weights |= params.found
        return gm

    def kernels(self) -> KernelTable:
        """Those of the backend."""
        return self.table

    def lower(self, context: PassContext) -> fx.GraphModule:
        """Floats in the place of codes."""
        graph = context.graph
        for node in list(graph.nodes):
            if node.target is QUANTIZE:
                node.target = straight_through
            elif node.target is DEQUANTIZE:
                codes = argument(node, "q")
                if codes.op == "get_attr":
                    self._weight(context, node)
                else:
                    node.replace_all_uses_with(codes)
                    graph.erase_node(node)
        graph.eliminate_dead_code()
        return context.gm

    def _weight(self, context: PassContext, node: fx.Node) -> None:
        """Mark the layer that reads a weight which is learned; dequantize another for good."""
        for user in node.users:
            if user.meta.get(KEY) in self.learned:
                user.meta[LEARNED] = user.meta[KEY]
        codes, scale, zero_point, element = arguments(node).values()
        q, s, z = (evaluate(context.gm, x) for x in (codes, scale, zero_point))
        real = dequantize_blocks(q, s, z, element_type(str(element)))
        value = new_constant(context.gm, f"{codes.target}_values", real, node)
        node.replace_all_uses_with(value)
        context.graph.erase_node(node)

    def compile(self, graph: Any, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        """The graph itself."""
        body: Callable[..., Any] = graph.body
        return body

    def record(self, body: fx.GraphModule, tensors: tuple[Tensor, ...]) -> Any:
        """Runs it."""
        return body(*tensors)
