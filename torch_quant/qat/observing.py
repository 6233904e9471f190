"""Ranges that follow the data while training, as those of Jacob et al. 2018, section 3.1.

While a QAT model observes, the range of an activation is a moving average of the extremes of its
batches, and that of a weight its present extremes; scales are set to them in each forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, fx

from torch_quant.core.qparams import QParams, choose_qparams
from torch_quant.core.spec import QuantSpec
from torch_quant.qat.fake_quantize import TRAINED_FAKE_QUANTIZE, read_label
from torch_quant.qat.methods import INPUT
from torch_quant.statistics import MinMaxObserver

__all__ = ["MOMENTUM", "observe_ranges", "range_of"]

MOMENTUM = 0.01
"""Weight of the newest batch in the range of an activation, as of ``"moving_average"``."""


def range_of(qparams: QParams) -> Tensor:
    """The ends of the range that codes reach: float32 of shape ``[2]``.

    >>> range_of(QParams(QuantSpec(), torch.tensor(0.5), torch.tensor(2, dtype=torch.int32)))
    tensor([ -1.0000, 126.5000])
    """
    spec = qparams.spec
    ends = [(end - qparams.zero_point) * qparams.scale for end in (spec.quant_min, spec.quant_max)]
    return torch.stack(ends).to(torch.float32)


def _merged(observer: MinMaxObserver) -> MinMaxObserver:
    """With what every process has seen: the merge of all of them, in one all-reduce."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return observer
    ends = torch.stack((-observer.min_val, observer.max_val))
    distributed.all_reduce(ends, distributed.ReduceOp.MAX)
    observer.min_val, observer.max_val = -ends[0], ends[1]
    return observer


def _present_grid(x: Tensor, ends: Tensor | None, spec: QuantSpec) -> QParams:
    """The scales of a batch of an activation, whose range is in ``ends``, or of a weight."""
    seen = MinMaxObserver(spec.granularity)
    if x.numel():
        seen.observe(x)
    else:
        seen.min_val, seen.max_val = seen.min_val.to(x.device), seen.max_val.to(x.device)
    if ends is None:
        return seen.qparams(spec)
    seen = _merged(seen)  # an empty batch too, for which the other processes wait
    low, high = seen.min_val, seen.max_val
    nothing_seen = low > high
    ends.lerp_(torch.where(nothing_seen, ends, torch.stack((low, high))), MOMENTUM)
    return choose_qparams(ends[0], ends[1], spec)


class _Observe(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, ends: Tensor | None, spec: QuantSpec
    ) -> tuple[Tensor, Tensor]:
        grid = _present_grid(x.detach(), None if ends is None else ends.detach(), spec)
        for held, new in ((scale, grid.scale), (zero_point, grid.zero_point)):
            held.data.copy_(new.reshape(held.shape))
        ctx.save_for_backward(scale, zero_point)
        outputs = scale.detach().clone(), zero_point.detach().clone()
        if not zero_point.is_floating_point():
            ctx.mark_non_differentiable(outputs[1])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Zeros: the data decides, but whoever counts gradients finds one."""
        of_grid = (
            torch.zeros_like(x) if wanted else None
            for x, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[1:3], strict=True)
        )
        return None, *of_grid, None, None


@fx.has_side_effect
def observed_grid(
    x: Tensor, scale: Tensor, zero_point: Tensor, ends: Tensor | None, label: str
) -> tuple[Tensor, Tensor]:
    """Set a grid to what ``x`` tells; gives it, with gradients of zero.

    It stays in a graph that does not read the result: one that is in float.
    """
    _, spec = read_label(label)
    found: tuple[Tensor, Tensor] = _Observe.apply(x, scale, zero_point, ends, spec)
    return found


def observe_ranges(body: fx.GraphModule) -> None:
    """Have every rounding of a body that has scales of its own set them first."""
    graph, grids = body.graph, dict[str, tuple[fx.Node, fx.Node]]()
    for node in graph.find_nodes(op="call_function", target=TRAINED_FAKE_QUANTIZE):
        x, scale, zero_point, _, _, role, _, label, ends, *_ = node.args
        if scale.op != "get_attr":
            continue  # chosen at each call
        if scale.target not in grids:
            with graph.inserting_before(node):
                seen = ends if role == INPUT else None
                both = graph.call_function(observed_grid, (x, scale, zero_point, seen, label))
                parts = [graph.call_function(_part, (both, i)) for i in (0, 1)]
            grids[scale.target] = (parts[0], parts[1])
        for place, part in zip((1, 2), grids[scale.target], strict=True):
            node.update_arg(place, part)


def _part(both: tuple[Tensor, Tensor], place: int) -> Tensor:
    return both[place]
