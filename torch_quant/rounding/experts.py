"""Experts whose matrices are one tensor: each is rounded by the tokens that are sent to it.

A product with all of them gets its rows sorted by expert, and where those of each end. So the calls
of one block say which rows are whose. Frantar and Alistarh, "QMoE: Practical Sub-1-Bit Compression
of Trillion-Parameter Models", 2023, round every expert by its own tokens too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_quant.algorithms import without_data
from torch_quant.algorithms.blocks import Block
from torch_quant.core.functional import dequantize
from torch_quant.core.methods import WeightMethod
from torch_quant.core.plan import QuantPlan
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.core.telling import at_site, tell
from torch_quant.graph.sites import Site
from torch_quant.statistics import Statistic

__all__ = ["Experts", "find_experts", "round_experts"]

_UNREACHED = (
    "no token was sent to it, so that its weight is rounded to nearest; give "
    "quantizer.round_weights inputs of more kinds"
)
_Heard = Callable[[str, str, Tensor, Tensor, Tensor], None]
"""Told of a product: path of the module, name of its parameter, rows, matrices, where rows end."""


@dataclass(eq=False)
class Experts:
    """The matrices of all experts that one product reads.

    Args:
        site: its name in the plan.
        path: of the module inside of the block.
        module: holds the parameter.
        name: of that.
        turned: whether it is ``[experts, in, out]``, else ``[experts, out, in]``.
        spec: the format, its granularity bound to the axis of the output channels.
        method: what rounds each matrix.
        described: the site itself.
    """

    site: str
    path: str
    module: nn.Module
    name: str
    turned: bool
    spec: QuantSpec
    method: WeightMethod
    described: Site
    rounded: tuple[Tensor, QParams] | None = None
    """Codes, ``[experts * out, in]``, and what they stand for, once :meth:`round_to` was called."""

    @property
    def matrices(self) -> Tensor:
        """As they are now, ``[experts, out, in]``."""
        value = self.module._parameters[self.name]
        assert value is not None
        return value.detach().transpose(1, 2) if self.turned else value.detach()

    @property
    def weight(self) -> Tensor:
        """One below the other, ``[experts * out, in]``, as ``grouped_linear`` reads them."""
        return self.matrices.reshape(-1, self.matrices.shape[2])

    def set_weight(self, weight: Tensor) -> None:
        """Have the twin compute with another weight, ``[experts * out, in]``."""
        made = weight.reshape(self.matrices.shape)
        value = made.transpose(1, 2).contiguous() if self.turned else made
        self.module._parameters[self.name] = nn.Parameter(value, requires_grad=False)

    def round_to(self, codes: Tensor, qparams: QParams) -> None:
        """The result: the twin computes with what the codes stand for from now on."""
        self.rounded = codes, qparams
        self.set_weight(dequantize(codes, qparams))


def find_experts(block: Block, sites: Iterable[Site], plan: QuantPlan) -> list[Experts]:
    """The products with experts in a block whose method wants data, in the order in which they run.

    Found by one call of the block: the products of a module, in their order, are its sites in
    theirs. What has another number or size of them is not among the result.

    Args:
        block: one sample of it is run, if a site is inside.
        sites: of the model, in the order in which they run.
        plan: how they are quantized.
    """
    inside: dict[str, list[Site]] = {}
    for site in sites:
        if site.module.startswith(f"{block.path}.") and block.path:
            inside.setdefault(site.module.removeprefix(f"{block.path}."), []).append(site)
    if not inside:
        return []
    seen: dict[str, dict[str, Tensor]] = {path: {} for path in inside}

    def note(path: str, name: str, x: Tensor, matrices: Tensor, ends: Tensor) -> None:
        seen[path].setdefault(name, matrices)

    with torch.no_grad(), _Listening(block.module, inside, note):
        block.call(block.samples[0])
    found = []
    for path, mine in inside.items():
        shapes = [(m.shape[0] * m.shape[2], m.shape[1]) for m in seen[path].values()]
        if shapes != [site.weight_shape for site in mine]:
            continue
        module = block.module.get_submodule(path)
        for site, (name, matrices) in zip(mine, seen[path].items(), strict=True):
            value, entry = module._parameters[name], plan[site.name]
            assert value is not None
            assert entry.weight is not None
            spec, count = entry.weight.on(0), len(matrices)
            each = spec.granularity.grid((matrices.shape[2], matrices.shape[1]))
            whole = spec.granularity.grid(site.weight_shape)
            method = entry.method
            if method is None or len(each) != 2 or whole != (count * each[0], each[1]):
                continue  # scales that several experts share
            turned = value.shape == matrices.shape and value.stride() == matrices.stride()
            found.append(Experts(site.name, path, module, name, turned, spec, method, site))
    return found


def round_experts(block: Block, experts: Sequence[Experts]) -> None:
    """Round the matrices of each product, with what those before it are rounded to.

    Every sample runs once for each product, since the moments of all experts of one are in memory:
    ``4 experts in^2`` bytes for a method that wants Hessians.

    Args:
        block: its linear layers are rounded.
        experts: of :func:`find_experts`.
    """
    for each in experts:
        known = _statistics(block, each)
        made = []
        for number, (matrix, of_it) in enumerate(zip(each.matrices, known, strict=True)):
            method, unreached = each.method, any(not x.batches for x in of_it.values())
            with at_site(f"{each.site}[{number}]"):
                if unreached:
                    tell(_UNREACHED)
                    method, of_it = without_data(method), {}
                made.append(method.quantize(matrix.contiguous(), each.spec, of_it))
        scales = torch.cat([qparams.scale for _, qparams in made])
        zeros = torch.cat([qparams.zero_point for _, qparams in made])
        codes = torch.cat([codes for codes, _ in made])
        each.round_to(codes, QParams(each.spec, scales, zeros))


def _statistics(block: Block, experts: Experts) -> list[dict[str, Statistic]]:
    """What the method wants to know of the rows of each expert."""
    site = experts.described
    wanted = experts.method.statistics(site).get(site.inputs[0], {})
    found = [{what: make() for what, make in wanted.items()} for _ in experts.matrices]

    def note(path: str, name: str, x: Tensor, matrices: Tensor, ends: Tensor) -> None:
        start = 0
        for mine, end in zip(found, ends.tolist(), strict=True):
            for statistic in mine.values() if end > start and name == experts.name else ():
                statistic.observe(x[start:end].detach())
            start = end

    with torch.no_grad(), _Listening(block.module, [experts.path], note):
        for sample in block.samples:
            block.call(sample)
    return found


class _Listening(TorchDispatchMode):
    """Tells of products whose matrices are a parameter of certain modules.

    Args:
        root: these modules are in it.
        paths: theirs.
        heard: what is told.
    """

    def __init__(self, root: nn.Module, paths: Iterable[str], heard: _Heard) -> None:
        super().__init__()
        self.heard = heard
        self.places = {
            _place(value): (path, name)
            for path in paths
            for name, value in root.get_submodule(path)._parameters.items()
            if value is not None and value.dim() == 3
        }

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if (operands := _operands(func, args, kwargs)) is not None:
            x, matrices, ends = operands
            place = self.places.get(_place(matrices))
            if place is not None and x.dim() == 2 and matrices.dim() == 3:
                self.heard(*place, x, matrices, ends)
        return func(*args, **kwargs)


def _place(matrices: Tensor) -> tuple[int, int]:
    """Where they lie, also turned; parameters may be views of one storage."""
    return matrices.data_ptr(), matrices.numel()


def _operands(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(rows, ``[experts, in, out]``, where each expert's rows end) of a product with experts."""
    if func is torch.ops.aten._grouped_mm.default:
        names = ("self", "mat2", "offs")
    elif str(func) == "transformers.grouped_mm_fallback.default":
        names = ("input", "weight", "offs")
    else:
        return None
    given = dict(zip((each.name for each in func._schema.arguments), args, strict=False))
    given |= dict(kwargs)
    x, matrices, ends = (given.get(name) for name in names)
    if not all(isinstance(each, Tensor) for each in (x, matrices, ends)):
        return None
    assert x is not None
    assert matrices is not None
    assert ends is not None
    return x, matrices, ends
