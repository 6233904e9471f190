"""Which linear layers pick the experts of a mixture: told by what is computed, not by names."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd

from torch_quant.graph.sites import Site

__all__ = ["is_router"]


def is_router(site: Site, modules: tuple[nn.Module, ...]) -> bool:
    """Whether a site gives one number for each expert that stands beside it.

    Experts are a parameter ``[experts, a, b]``, ``a`` or ``b`` the width of the site's input, or a
    list of modules of one class of which some are picked by the site's numbers.

    Args:
        site: the site.
        modules: those that it runs in, outermost first.

    >>> site = Site("gate", "linear", "gate", ("x",), (), "gate", 8, (2, 8), picks=True)
    >>> block = nn.Module()
    >>> block.gate = nn.Linear(8, 2)
    >>> block.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    >>> is_router(site, (block, block.gate))
    True
    """
    if site.op != "linear" or len(site.weight_shape) != 2:
        return False
    experts, width = site.weight_shape
    return experts > 1 and any(
        experts in _stacked(module, width) or (site.picks and experts in _listed(module))
        for module in modules[-2:]
    )


def _stacked(owner: nn.Module, width: int) -> Iterator[int]:
    """How many experts each parameter holds that read vectors of ``width``."""
    for module in (owner, *owner._modules.values()):
        if module is None or isinstance(module, _ConvNd):
            continue
        for value in module._parameters.values():
            if value is not None and value.dim() == 3 and width in value.shape[1:]:
                yield value.shape[0]


def _listed(owner: nn.Module) -> Iterator[int]:
    """How many experts each list of ``owner`` may hold."""
    for module in owner._modules.values():
        if isinstance(module, nn.ModuleList) and len(set(map(type, module))) == 1:
            yield len(module)
