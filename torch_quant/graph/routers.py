"""Which linear layers pick the experts of a mixture, by how the model is built, not by names."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd

from torch_quant.graph.sites import Site

__all__ = ["is_router"]


def is_router(site: Site, modules: tuple[nn.Module, ...]) -> bool:
    """Whether a site gives one number for each expert that stands beside it.

    Experts are a parameter ``[experts, a, b]``, ``a`` or ``b`` the width of the site's input, or,
    below the model itself, a list of modules of one class.

    Args:
        site: the site.
        modules: those that it runs in, outermost first.

    >>> from torch import ones
    >>> site = Site("gate", "linear", "gate", ("x",), (), "gate", 8, (4, 8))
    >>> block = nn.Module()
    >>> block.gate, block.experts = nn.Linear(8, 4), nn.ParameterList([ones(4, 16, 8)])
    >>> is_router(site, (block, block.gate))
    True
    """
    if site.op != "linear" or len(site.weight_shape) != 2:
        return False
    experts, width = site.weight_shape
    return experts > 1 and any(
        experts in _experts(module, width, root=module is modules[0]) for module in modules[-2:]
    )


def _experts(owner: nn.Module, width: int, *, root: bool) -> Iterator[int]:
    """How many experts ``owner`` has, which read vectors of ``width``; of each kind of them."""
    for module in (owner, *owner._modules.values()):
        if module is None or isinstance(module, _ConvNd):
            continue
        for value in module._parameters.values():
            if value is not None and value.dim() == 3 and width in value.shape[1:]:
                yield value.shape[0]
        listed = isinstance(module, nn.ModuleList) and not root and module is not owner
        if listed and len({type(each) for each in module._modules.values()}) == 1:
            yield len(module._modules)
