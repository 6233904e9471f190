"""A user's own ``torch.ao.quantization`` observer (or torchao's), used as one of ours.

Nothing of torch.ao is imported here: the user's class brings its code along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torch_quant.core.granularity import Granularity, PerChannel, PerTensor
from torch_quant.core.qparams import QParams, choose_qparams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.statistics.base import Observer

__all__ = ["AoObserver", "from_ao"]

_PLAIN = {"MinMaxObserver", "PerChannelMinMaxObserver"}  # whose calculate_qparams only scales


def _made(factory: Callable[..., Any], **options: Any) -> Any:
    """What the factory makes, if it looks like a torch.ao observer."""
    if isinstance(factory, nn.Module):
        raise InvalidConfig(
            f"from_ao got an instance of {type(factory).__name__}; every tensor needs its own: "
            "pass the class, or the class's with_args(...)"
        )
    try:
        made = factory(**options)
    except TypeError as error:
        raise InvalidConfig(
            f"from_ao cannot call {factory!r} with {options}: {error}; "
            "pass an observer class, or the class's with_args(...); for per-channel specs it must "
            "take ch_axis, as PerChannelMinMaxObserver does"
        ) from error
    calls = [callable(getattr(made, name, None)) for name in ("forward", "calculate_qparams")]
    if not isinstance(made, nn.Module) or not all(calls):
        raise InvalidConfig(
            f"from_ao({factory!r}) makes a {type(made).__name__}; expected a torch.ao observer: "
            "a module with forward and calculate_qparams, such as MinMaxObserver"
        )
    return made


def from_ao(factory: Callable[..., Any]) -> type[Observer]:
    """Wrap a torch.ao observer class, or its ``with_args(...)``, as an observer class.

    Observers with plain extremes (the MinMax and MovingAverage families) serve any spec, through
    our own scale arithmetic. Those with their own search (HistogramObserver and the like) serve
    only the dtype, range and scheme that they were made with.

    Args:
        factory: a class, or anything that makes an observer when called. For per-channel specs it
            must take ``ch_axis``.

    Returns:
        A class to be used wherever an observer class is. Its ``name``, ``from_ao(...)``, is for
        messages: it is not registered, so a saved state cannot find the class by it.

    Raises:
        InvalidConfig: what ``factory`` makes is no torch.ao observer.
    """
    label = type(_made(factory)).__name__
    return type(
        label, (AoObserver,), {"name": f"from_ao({label})", "factory": staticmethod(factory)}
    )


class AoObserver(Observer):
    """An observer that leaves the statistics to a torch.ao one; made by :func:`from_ao`."""

    factory: ClassVar[Callable[..., Any]]

    def __init__(self, granularity: Granularity | None = None) -> None:
        super().__init__(granularity)
        options = {}
        if isinstance(self.granularity, PerChannel):
            options = {"ch_axis": self.granularity.axis}
        elif not isinstance(self.granularity, PerTensor):
            raise InvalidConfig(
                f"{self.name} keeps statistics per tensor or per channel, not {self.granularity}; "
                "use an observer of torch_quant there"
            )
        self.module = _made(type(self).factory, **options)
        self._shape: tuple[int, ...] = ()
        wanted = options.get("ch_axis")
        theirs = getattr(self.module, "ch_axis", None)
        if theirs != wanted:
            fix = "MinMaxObserver" if wanted is None else "PerChannelMinMaxObserver"
            raise InvalidConfig(
                f"{self.name} has ch_axis={theirs} where ch_axis={wanted} is needed; "
                f"use an observer such as {fix} there"
            )

    @property
    def _plain(self) -> bool:
        """Whether the range is simply the module's ``min_val`` and ``max_val``."""
        owner = next(c for c in type(self.module).__mro__ if "calculate_qparams" in vars(c))
        return owner.__name__ in _PLAIN and hasattr(self.module, "min_val")

    def _record(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self.module.to(x.device)(x.to(torch.float32))
        self._shape = tuple(low.shape)

    def _merge(self, other: Any) -> None:
        raise InvalidConfig(
            f"{self.name} cannot be merged, as torch.ao's observers cannot; use one of torch_quant"
        )

    def _range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        if self._plain:
            return (
                self.module.min_val.view(self._shape),
                self.module.max_val.view(self._shape),
            )
        own = self._own_qparams(spec)
        low, high = (value - own.zero_point for value in (spec.quant_min, spec.quant_max))
        return low * own.scale, high * own.scale

    def qparams(self, spec: QuantSpec) -> QParams:
        """Scales for ``spec``.

        Raises:
            NotCalibrated: no data was observed.
            InvalidConfig: the torch.ao observer computes its own scale, and for another format.
        """
        if self._plain:
            return super().qparams(spec)
        self._check(spec)
        if spec.clip != 1.0:
            return super().qparams(spec)  # of the range that its own scale covers
        return self._own_qparams(spec)

    def _own_qparams(self, spec: QuantSpec) -> QParams:
        self._check_format(spec)
        try:
            scale, zero_point = self.module.calculate_qparams()
        except Exception as error:
            raise InvalidConfig(f"{self.name} computes no scale: {error}") from error
        scale = scale.detach().to(torch.float32).reshape(self._shape)
        zero_point = zero_point.detach().to(torch.int32).reshape(self._shape)
        if spec.symmetric:
            fixed = choose_qparams(-scale, scale, spec).zero_point
            if not torch.equal(zero_point, fixed):
                raise InvalidConfig(
                    f"{self.name} puts the real 0 at {zero_point.tolist()}, a {spec} has it at "
                    f"{fixed.tolist()}; use the full range of the dtype, or a signed one"
                )
        return QParams(spec, scale, zero_point)

    def _check_format(self, spec: QuantSpec) -> None:
        """Raise unless the module was made for ``spec``'s dtype, range and scheme."""
        scheme = "symmetric" if spec.symmetric else "affine"
        wanted = {
            "dtype": str(spec.dtype).replace("torch.", "torch.q"),
            "qscheme": f"torch.{self.granularity.kind}_{scheme}",
            "quant_min": str(spec.quant_min),
            "quant_max": str(spec.quant_max),
        }
        given = {key: str(getattr(self.module, key, None)) for key in wanted}
        # torch.uint8 and torch.quint8 are one format here.
        given["dtype"] = given["dtype"].replace("torch.q", "torch.").replace("torch.", "torch.q")
        if given != wanted:
            theirs, ours = (
                ", ".join(f"{key}={value}" for key, value in each.items())
                for each in (given, wanted)
            )
            raise InvalidConfig(
                f"{self.name} computes its own scale, for {theirs}, but a {spec} is needed; "
                f"make it with_args({ours}), or use an observer of torch_quant"
            )

    def state_dict(self) -> dict[str, Any]:
        module = {f"ao.{key}": value.clone() for key, value in self.module.state_dict().items()}
        return {"batches": self.batches, "shape": list(self._shape), **module}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches, self._shape = int(state["batches"]), tuple(state["shape"])
        module = self.module.state_dict()  # with its metadata, which torch.ao decides by
        # Clones: some torch.ao observers keep the very tensors they load, and write into them.
        module.update({key: state[f"ao.{key}"].clone() for key in module})
        self.module.load_state_dict(module)
