"""Finds the site where NaN or infinity comes up first while training; and taps tensors of a graph.

Both rewrite a body of a graph for as long as they are on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from torch_quant.errors import QuantError
from torch_quant.qat.fake_quantize import ROWS, TRAINED_FAKE_QUANTIZE
from torch_quant.qat.methods import WEIGHT

__all__ = ["insert_taps", "insert_watches", "watched"]


def _found(x: Tensor) -> str:
    """What is not finite in a tensor, in words; empty if all is."""
    if bool(torch.isfinite(x).all()):
        return ""
    return "NaN" if bool(torch.isnan(x).any()) else "infinity"


def watched(x: Tensor, what: str) -> Tensor:
    """``x``; raises :class:`QuantError` if it, or later its gradient, is not finite.

    >>> watched(torch.tensor([1.0, float("nan")]), "head: the input")
    Traceback (most recent call last):
    torch_quant.errors.QuantError: head: the input holds NaN, shape (2,), in the forward pass
    """
    if found := _found(x.detach()):
        raise QuantError(f"{what} holds {found}, shape {tuple(x.shape)}, in the forward pass")
    if not x.requires_grad:
        return x

    def check(grad: Tensor) -> None:
        if found := _found(grad):
            raise QuantError(
                f"the gradient of {what} holds {found}, shape {tuple(grad.shape)}; nothing that "
                "is watched behind it does: look at what computes the loss from it"
            )

    same = x.view_as(x)  # a hook of its own, where x has several readers
    with contextlib.suppress(RuntimeError):  # a tensor that takes none
        same.register_hook(check)
    return same


def insert_watches(body: fx.GraphModule, path: str) -> None:
    """Watch what is rounded, its scales, and the result of each product with a rounded weight.

    Args:
        body: the graph.
        path: of its module in the model.
    """
    graph = body.graph

    for node in graph.find_nodes(op="call_function", target=TRAINED_FAKE_QUANTIZE):
        x, scale, _, _, _, role, *_ = node.args
        name = str(scale.target).removesuffix("_scale") if scale.op == "get_attr" else node.name
        site, _, which = f"{path}.{name}".strip(".").rpartition(".")
        what = f"{site}: the {which}" if site else which
        with graph.inserting_before(node):
            node.update_arg(0, graph.call_function(watched, (x, what)))
            node.update_arg(1, graph.call_function(watched, (scale, f"{what}'s scale")))
        if role == WEIGHT:
            products = [user for user in node.users if user.target is not watched]
            if node.args[ROWS:]:  # it is the result
                products = [node]
            while len(products) == 1 and products[0].args[:1] == (node,):  # it is unfolded
                node = products[0]
                products = list(node.users)
            for product in products:
                with graph.inserting_after(product):
                    seen = graph.call_function(watched, (product, f"{site}: the result"))
                product.replace_all_uses_with(
                    seen, delete_user_cb=lambda user, new=seen: user is not new
                )


class _Tap(nn.Module):
    """Hands a tensor to a function, and on."""

    def __init__(self, record: Callable[[str, Tensor], None], key: str) -> None:
        super().__init__()
        self.record, self.key = record, key

    def forward(self, x: Tensor) -> Tensor:
        self.record(self.key, x)
        return x


def insert_taps(
    body: fx.GraphModule, tensors: Mapping[str, str], record: Callable[[str, Tensor], None]
) -> None:
    """Hand tensors of a body to a function whenever it runs.

    Args:
        body: the graph.
        tensors: key -> the node that makes it.
        record: is given key and tensor.
    """
    graph = body.graph
    nodes = {node.name: node for node in graph.nodes}
    for i, (key, name) in enumerate(tensors.items()):
        body.add_submodule(f"tap_{i}", _Tap(record, key))
        node = nodes[name]
        with graph.inserting_after(node):
            tapped = graph.call_module(f"tap_{i}", (node,))
        node.replace_all_uses_with(tapped, delete_user_cb=lambda user, new=tapped: user is not new)
