"""Round to nearest: each value of a weight to the closest that its scale can represent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torch_quant.algorithms.clipping import full_range_qparams, searched_qparams
from torch_quant.config import ObserverLike, check_observer, made_observer, registered_name
from torch_quant.core.functional import quantize
from torch_quant.core.methods import Wanted, WeightMethod, register_weight_method
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.graph.sites import Site
from torch_quant.statistics import MEAN_SQUARE, MeanSquare, Statistic

__all__ = ["DEFAULT_METHOD", "RoundToNearest", "without_data"]

_EVERYTHING = "minmax"


@register_weight_method
@dataclass(frozen=True)
class RoundToNearest(WeightMethod):
    """The default. It needs no data, unless errors are to be weighted.

    Args:
        observer: says which range of each block of the weight is represented; what lies outside is
            clipped.
        clip_search: take the scale, and zero point, of each block that leaves the least squared
            error, in place of what an observer says (:mod:`torch_quant.algorithms.clipping`).
        full_range: let symmetric scales be negative, so that the largest value of a block uses the
            longer side of the integers, -8 of -8 to 7.
        weighted: in the search, let the error of an input channel count as much as its mean square
            in calibration. Where that is not known (in other than linear layers, and in those that
            no data reached) nothing is searched. Language models want it: their few large weights
            often belong to loud channels, and a search that does not know that clips them.

    Raises:
        InvalidConfig: an unknown observer name; one beside ``clip_search`` or ``full_range``, which
            look at all values; ``weighted`` without a search.

    >>> import torch
    >>> from torch_quant import PerChannel
    >>> spec = QuantSpec.of(bits=4, signed=True, symmetric=True, granularity=PerChannel(0))
    >>> weight = torch.tensor([[1.0, 7.0], [-3.0, 0.5]])
    >>> RoundToNearest().quantize(weight, spec, {})[0].tolist()
    [[1, 7], [-7, 1]]
    >>> RoundToNearest(full_range=True).quantize(weight, spec, {})[0].tolist()
    [[-1, -8], [-8, 1]]
    """

    name = "rtn"
    serves_unreached = True

    observer: ObserverLike = _EVERYTHING
    clip_search: bool = False
    full_range: bool = False
    weighted: bool = False

    def __post_init__(self) -> None:
        check_observer(self.observer)
        for name in ("clip_search", "full_range", "weighted"):
            if not isinstance(getattr(self, name), bool):
                value = getattr(self, name)
                raise InvalidConfig(f"RoundToNearest({name}={value!r}): expected True or False")
        searching = self.clip_search or self.full_range
        if searching and self.observer != _EVERYTHING:
            raise InvalidConfig(
                f"RoundToNearest(observer={self.observer!r}): clip_search and full_range look at "
                f"all values of a block; leave the observer out, or them"
            )
        if self.weighted and not self.clip_search:
            raise InvalidConfig(
                "RoundToNearest(weighted=True): only a search can be weighted; give "
                "clip_search=True"
            )

    @property
    def wants_statistics(self) -> bool:
        return self.weighted

    def statistics(self, site: Site) -> Wanted:
        if not self.weighted or not site.smoothable:
            return {}
        return {site.inputs[0]: {MEAN_SQUARE: MeanSquare}}

    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: Mapping[str, Statistic]
    ) -> tuple[Tensor, QParams]:
        qparams = self._qparams(weight, spec, statistics)
        return quantize(weight, qparams), qparams

    def _qparams(
        self, weight: Tensor, spec: QuantSpec, statistics: Mapping[str, Statistic]
    ) -> QParams:
        squares = statistics.get(MEAN_SQUARE) if self.weighted else None
        assert squares is None or isinstance(squares, MeanSquare)
        importance = squares.mean if squares is not None and squares.batches else None
        if self.clip_search and self.weighted == (importance is not None):
            return searched_qparams(weight, spec, importance=importance, full_range=self.full_range)
        if self.full_range:
            return full_range_qparams(weight, spec)
        observer = made_observer(self.observer, spec.granularity)
        observer.observe(weight)
        return observer.qparams(spec)

    def to_dict(self) -> dict[str, Any]:
        """As data; raises :class:`InvalidConfig` for an observer that is not registered."""
        return {**super().to_dict(), "observer": registered_name(self.observer)}


DEFAULT_METHOD = RoundToNearest()
"""How a weight is rounded where the user asks for nothing else."""


def without_data(method: WeightMethod | None) -> WeightMethod:
    """What rounds a weight in the place of ``method`` where there is no data for that.

    Itself if it needs none, else round to nearest, over the full range if ``method`` uses that.

    >>> from torch_quant import GPTQ
    >>> without_data(GPTQ(full_range=True)) == RoundToNearest(full_range=True)
    True
    """
    if method is None:
        return DEFAULT_METHOD
    if not (method.wants_statistics or method.wants_blocks):
        return method
    return RoundToNearest(full_range=bool(getattr(method, "full_range", False)))
