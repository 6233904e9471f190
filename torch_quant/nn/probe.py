"""Modules that proxies insert into a graph: they look at tensors and change no value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ObserverProbe", "SiteProbe", "substitute", "track"]


class ObserverProbe(nn.Module):
    """Hands a tensor to whoever keeps the statistics.

    An empty one has none: no token of this batch went to that expert, say.

    Args:
        observe: takes the tensor.
        compute: makes the tensor from the probe's arguments; None if it is the only argument.
    """

    def __init__(
        self,
        observe: Callable[[Tensor], Any],
        compute: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._observe, self._compute = observe, compute

    def forward(self, *args: Any, **kwargs: Any) -> None:
        if self._compute is None:
            x = args[0]
        else:
            with torch.no_grad():
                x = self._compute(*args, **kwargs)
        if x.numel():
            self._observe(x.detach())


class SiteProbe(nn.Module):
    """Stands behind the result of a site, which it passes on; can compute the site quantized.

    Args:
        name: the site.
        exact: the site in float, a function of its arguments.
        quantized: the same, quantized.
        half: the same with quantized activations and a float weight; None for a site that does not
            have both.
        operand: which argument is the quantized activation, where there is one only.
        visit: takes the probe, the result and the arguments, and returns the result.
        candidates: name -> the site quantized otherwise.
    """

    def __init__(
        self,
        name: str,
        exact: Callable[..., Tensor],
        quantized: Callable[..., Tensor],
        half: Callable[..., Tensor] | None,
        operand: int | None,
        visit: Callable[[SiteProbe, Tensor, tuple[Any, ...]], Tensor],
        candidates: Mapping[str, Callable[..., Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.operand = name, operand
        self.__dict__["_candidates"] = candidates or {}
        # No submodules: nothing may reach the model's parameters through the probe.
        self.__dict__.update(exact=exact, quantized=quantized, half=half, _visit=visit)
        self._faithful: bool | None = None

    def forward(self, y: Tensor, *args: Any) -> Tensor:
        if not y.numel():  # no token of this batch went to that expert, say: there is no noise
            return y
        return self._visit(self, y, args)  # type: ignore[no-any-return, operator]

    def candidates(self) -> Mapping[str, Callable[..., Tensor]]:
        """The site in other formats, by name."""
        return self.__dict__["_candidates"]  # type: ignore[no-any-return]

    def reference(self, y: Tensor, args: tuple[Any, ...]) -> Tensor:
        """What the quantized site is compared with: ``y``, if the float site gives that.

        It does unless the graph has more in one operator than the site (a matrix for a bias).
        """
        if self._faithful is None:
            gap = (self.exact(*args) - y).abs()  # type: ignore[operator]
            self._faithful = bool((gap.nan_to_num() <= y.abs().nan_to_num().max() * 2.0**-12).all())
        return y if self._faithful else self.exact(*args)  # type: ignore[operator]


class _Track(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor) -> Tensor:
        return y.clone()  # a view must not be written to in place, which operators may do inside

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        (grad,) = grads
        return (grad if ctx.needs_input_grad[0] else None), grad.new_zeros(())


def track(y: Tensor, anchor: Tensor) -> Tensor:
    """``y``, bit for bit, with a path from its gradient to that of ``anchor`` (a zero scalar).

    Args:
        y: any tensor.
        anchor: a scalar that wants a gradient.
    """
    return _Track.apply(y, anchor)  # type: ignore[no-any-return]


class _Substitute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def substitute(y: Tensor, value: Tensor) -> Tensor:
    """``value``, which differs from ``y`` by rounding only, with the gradient of ``y``."""
    return _Substitute.apply(y, value)  # type: ignore[no-any-return]
