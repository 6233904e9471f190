"""Round to nearest: each value of a weight to the closest that its scale can represent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torch_quant.config import ObserverLike, check_observer, made_observer, registered_name
from torch_quant.core.functional import quantize
from torch_quant.core.methods import WeightMethod, register_weight_method
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.statistics import Statistic

__all__ = ["DEFAULT_METHOD", "RoundToNearest"]


@register_weight_method
@dataclass(frozen=True)
class RoundToNearest(WeightMethod):
    """The default. It needs no data.

    Args:
        observer: says which range of each block of the weight is represented; what lies outside is
            clipped.

    Raises:
        InvalidConfig: an unknown observer name.

    >>> import torch
    >>> from torch_quant import PerChannel
    >>> spec = QuantSpec.of(bits=4, signed=True, symmetric=True, granularity=PerChannel(0))
    >>> RoundToNearest().quantize(torch.tensor([[1.0, 7.0], [-3.0, 0.5]]), spec, {})[0].tolist()
    [[1, 7], [-7, 1]]
    """

    name = "rtn"

    observer: ObserverLike = "minmax"

    def __post_init__(self) -> None:
        check_observer(self.observer)

    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: Mapping[str, Statistic]
    ) -> tuple[Tensor, QParams]:
        observer = made_observer(self.observer, spec.granularity)
        observer.observe(weight)
        qparams = observer.qparams(spec)
        return quantize(weight, qparams), qparams

    def to_dict(self) -> dict[str, Any]:
        """As data; raises :class:`InvalidConfig` for an observer that is not registered."""
        return {"name": self.name, "observer": registered_name(self.observer)}


DEFAULT_METHOD = RoundToNearest()
"""How a weight is rounded where the user asks for nothing else."""
