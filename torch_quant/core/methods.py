"""The two seams of what changes numbers: how a weight is rounded, and what makes a graph easier.

A member is a frozen dataclass with a name: its options are its fields, and it is data both ways.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from torch_quant.core.members import read_member
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.core.telling import at_site
from torch_quant.errors import InvalidConfig

if TYPE_CHECKING:
    from torch_quant.algorithms.blocks import Block, Layer
    from torch_quant.core.plan import QuantPlan
    from torch_quant.graph.sites import Site
    from torch_quant.passes.base import Params, PassContext
    from torch_quant.statistics import Statistic

__all__ = [
    "TRANSFORMS",
    "WEIGHT_METHODS",
    "Method",
    "Transform",
    "Wanted",
    "WeightMethod",
    "read_transform",
    "read_weight_method",
    "register_transform",
    "register_weight_method",
]

Wanted = Mapping[str, Mapping[str, "Callable[[], Statistic]"]]
"""Tensor key -> what for, ``"channels"`` say -> what makes the statistic."""


@dataclass(frozen=True)
class Method(ABC):
    """What both seams have in common; a subclass is a frozen dataclass too, with a ``name``."""

    name: ClassVar[str]
    wants_blocks: ClassVar[bool] = False
    """Whether it only works on whole blocks: ``quantizer.round_weights(model, batches)``."""
    wants_targets: ClassVar[bool] = False
    """Whether it has to know what the float model's blocks give; two streams of data are kept."""
    wants_floats: ClassVar[bool] = False
    """Whether it has to know what the float model's blocks are given; likewise."""
    wants_importance: ClassVar[bool] = False
    """Whether errors at the end of a part of a graph count by the square of the gradient that the
    model's outputs have there, in place of all alike."""

    def refusal(self, site: Site) -> str:
        """Why it does not serve ``site``, empty if it does. It is left out there then.

        >>> from torch_quant import RoundToNearest
        >>> from torch_quant.graph.sites import Site
        >>> head = Site("head", "linear", "head", ("x",), (), "head", 8, (2, 4))
        >>> RoundToNearest().refusal(head)
        ''
        """
        blocks = self.wants_blocks and site.op != "linear"
        return "it works on the linear layers of a block" if blocks else ""

    def statistics(self, site: Site) -> Wanted:
        """What calibration has to record for it of the tensors of ``site``, beside ranges.

        >>> from torch_quant import SmoothQuant
        >>> from torch_quant.graph.sites import Site
        >>> head = Site("head", "linear", "head", ("x",), (), "head", 8, (2, 4), smoothable=True)
        >>> {key: list(wanted) for key, wanted in SmoothQuant().statistics(head).items()}
        {'x': ['channels']}
        """
        return {}

    @property
    def wants_statistics(self) -> bool:
        """Whether it asks calibration for anything at all."""
        return type(self).statistics is not Method.statistics

    def to_dict(self) -> dict[str, Any]:
        """Its name and options, ready for JSON and YAML.

        >>> from torch_quant import SmoothQuant
        >>> SmoothQuant(0.5).to_dict()
        {'name': 'smoothquant', 'alpha': 0.5, 'min_gain': 0.0}
        """
        return {"name": self.name} | {each.name: getattr(self, each.name) for each in fields(self)}

    def __str__(self) -> str:
        options = ", ".join(f"{each.name}={getattr(self, each.name)!r}" for each in fields(self))
        return f"{self.name}({options})" if options else self.name


class WeightMethod(Method):
    """How a weight becomes integers, or the codes of another element type.

    >>> from torch_quant.core.functional import quantize
    >>> from torch_quant import RoundToNearest
    >>> @register_weight_method
    ... @dataclass(frozen=True)
    ... class Sparse(WeightMethod):  # rounds, and small values become 0
    ...     name = "sparse"
    ...     share: float = 0.5
    ...     def quantize(self, weight, spec, statistics):
    ...         kept = weight.abs() >= weight.abs().quantile(self.share)
    ...         return RoundToNearest().quantize(weight * kept, spec, statistics)
    >>> read_weight_method({"name": "sparse", "share": 0.9})
    Sparse(share=0.9)
    >>> del WEIGHT_METHODS["sparse"]
    """

    serves_unreached: ClassVar[bool] = False
    """Whether it has a rule for layers that no calibration data reached, as experts may be; their
    statistics have ``batches == 0``. Others are refused there with :class:`NotCalibrated`."""

    @abstractmethod
    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: Mapping[str, Statistic]
    ) -> tuple[Tensor, QParams]:
        """The codes of a weight and what they stand for.

        Args:
            weight: finite float32, in the shape that its operator takes; of an LSTM, the matrices
                that share scales, side by side.
            spec: the format, its granularity bound to the axis of the output channels.
            statistics: what :meth:`statistics` asked for of the site's input, by what for.

        Returns:
            Codes in ``spec.dtype``, of the shape of ``weight``, and scales and zero points.

        Raises:
            QuantError: the weight cannot be quantized; says why.
        """

    @property
    def elsewhere(self) -> WeightMethod | None:
        """What rounds the weights of sites that it refuses: the default, as None.

        It is round to nearest over the full range for a method that uses that.

        >>> from torch_quant import AutoRound
        >>> AutoRound().elsewhere, AutoRound(full_range=True).elsewhere.full_range
        (None, True)
        """
        if not getattr(self, "full_range", False):
            return None
        return read_weight_method({"name": "rtn", "full_range": True})

    def round_block(self, block: Block, layers: Sequence[Layer]) -> None:
        """Round the weights of a block; by default each by :meth:`quantize`, in their order.

        A method with an option ``sequential`` that is true has the inputs of later layers recorded
        once those before them are rounded.

        Args:
            block: holds the data, and other layers.
            layers: those of the block that this method rounds: it calls ``layer.round_to`` of each.

        Raises:
            QuantError: a weight cannot be quantized; says why.

        >>> from torch import nn, ones
        >>> from torch_quant import Quantizer, recipes
        >>> model = nn.Sequential(nn.Linear(32, 8))
        >>> quantizer = Quantizer("reference", qconfig=recipes.int8_weight_only())
        >>> print(quantizer.round_weights(model, [ones(4, 32)]).blocks[0].methods)
        ('rtn',)
        """
        groups: list[Sequence[Layer]] = [layers]
        if getattr(self, "sequential", False):
            groups = [reading.layers for reading in block.reading(layers)]
            reached = {layer for group in groups for layer in group}
            groups.append([layer for layer in layers if layer not in reached])
        for group in groups:
            found, weights = self.learned(block, group)
            statistics, made = dict(found), []  # statistics of a layer go with it
            del found
            for layer in (each for each in group if each.rounded is None):
                weight = weights.get(layer, layer.weight).contiguous()
                mine = statistics.pop(layer.site, {})
                shared = {id(each) for other in statistics.values() for each in other.values()}
                for each in mine.values():
                    each.disposable = id(each) not in shared
                with at_site(layer.site):
                    made.append((layer, self.quantize(weight, layer.spec, mine)))
            for layer, (codes, qparams) in made:  # rounded weights take four times as much
                layer.round_to(codes, qparams)

    def learned(
        self, block: Block, layers: Sequence[Layer]
    ) -> tuple[Mapping[str, Mapping[str, Statistic]], Mapping[Layer, Tensor]]:
        """What :meth:`round_block` goes by: what :meth:`statistics` asks for, by site, and weights.

        These are rounded in the place of the layers' own; by default there are none.

        Args:
            block: holds the data.
            layers: some of it.

        >>> from torch import nn
        >>> from torch_quant import RoundToNearest
        >>> from torch_quant.algorithms.blocks import Block
        >>> RoundToNearest().learned(Block("", nn.Identity(), (), []), ())
        ({}, {})
        """
        return (block.observe(layers, self) if self.wants_statistics else {}), {}


class Transform(Method):
    """A rewrite of the float graph behind which it is easier to quantize.

    >>> from torch_quant import SmoothQuant
    >>> read_transform("smoothquant") == SmoothQuant()
    True
    >>> print(SmoothQuant(0.5))
    smoothquant(alpha=0.5, min_gain=0.0)
    """

    last: ClassVar[bool] = False
    """Whether it has to come after those that change weights, in whatever order they are given."""
    changes_input: ClassVar[bool] = True
    """Whether a layer reads another tensor behind it, of which no statistics were recorded."""
    trains: ClassVar[bool] = False
    """Whether weights can be trained behind it: they stay expressions of the model's parameters
    where ``context.live``, and what was computed from weights is ``context.params.kept``."""
    row_scales: ClassVar[bool] = False
    """Whether it has tensors inside of an operator rounded on a scale for each row, which a kernel
    has to do (``Kernel.row_scales``): it is left out where it does not."""

    @property
    def condition(self) -> str:
        """Where an optional transform is applied, for those who ask why it is not.

        >>> from torch_quant import SmoothQuant
        >>> SmoothQuant(0.8).condition
        ''
        """
        return ""

    @property
    def optional(self) -> bool:
        """Whether it may be left out where it cannot be applied, or does not help.

        >>> from torch_quant import SmoothQuant
        >>> SmoothQuant(0.8, min_gain=1.5).optional
        True
        """
        return False

    def settled(self, plan: QuantPlan, params: Params) -> Mapping[str, Transform | None]:
        """What an optional transform comes to, once there is data; the others are as they are.

        Args:
            plan: names it at some sites.
            params: has the statistics and the graphs.

        Returns:
            Site -> the transform to apply in its place, None for none.

        >>> from torch_quant import SmoothQuant
        >>> from torch_quant.core.plan import QuantPlan
        >>> from torch_quant.passes.base import NoParams
        >>> SmoothQuant(0.8, min_gain=1.5).settled(QuantPlan(), NoParams())  # nothing asks for it
        {}
        """
        return {}

    def gains(self, plan: QuantPlan, params: Params) -> Mapping[str, float]:
        """By what factor it is predicted to lower the noise of rounding, at sites that have it.

        Of optional transforms that change what a site reads, it gets what gains most; arguments are
        those of :meth:`settled`.

        >>> from torch_quant import BiasCorrection, QuantPlan
        >>> from torch_quant.passes.base import NoParams
        >>> BiasCorrection().gains(QuantPlan(), NoParams())
        {}
        """
        return {}

    def hindered(self, plan: QuantPlan, params: Params) -> Collection[str]:
        """Sites where it is not to be, if optional, since other layers are planned as they are.

        >>> from torch_quant import BiasCorrection, QuantPlan
        >>> from torch_quant.passes.base import NoParams
        >>> BiasCorrection().hindered(QuantPlan(), NoParams())
        ()
        """
        return ()

    @abstractmethod
    def apply(self, context: PassContext) -> int:
        """Rewrite what reads or makes the sites whose plan has this transform.

        A tensor that it makes gets a key of its own (``node.meta``), and its statistics by
        ``context.derive``. In float, nothing but rounding may change.

        Returns:
            How many sites it changed.

        Raises:
            NotCalibrated: a statistic is missing; from ``context.statistic``.
        """

    def moved(
        self, statistics: Mapping[str, Statistic], key: str, params: Params
    ) -> Mapping[str, Statistic] | None:
        """``statistics`` of a layer's input (by what for), as the layer reads it behind this.

        None, the default, where that cannot be said. ``key`` is that of the tensor that was
        recorded, and ``params`` has what the transform computed.

        >>> from torch_quant import BiasCorrection
        >>> from torch_quant.passes.base import NoParams
        >>> BiasCorrection().moved({}, "x", NoParams())
        """
        return None

    def scale_block(self, block: Block, layers: Sequence[Layer]) -> None:
        """Scale a block before its weights are rounded; nothing by default.

        Args:
            block: ``block.reading(layers)`` has the tensors that may be scaled, ``block.scale``
                does it.
            layers: those that have this transform.

        >>> from torch import nn
        >>> from torch_quant import SmoothQuant
        >>> from torch_quant.algorithms.blocks import Block
        >>> SmoothQuant().scale_block(Block("", nn.Identity(), (), []), ())  # it works on graphs
        """


WEIGHT_METHODS: dict[str, type[WeightMethod]] = {}
"""Every weight method by its name; filled at import by :func:`register_weight_method`."""
TRANSFORMS: dict[str, type[Transform]] = {}
"""Every transform by its name; filled at import by :func:`register_transform`."""

W = TypeVar("W", bound=type[WeightMethod])
T = TypeVar("T", bound=type[Transform])


def register_weight_method(cls: W) -> W:
    """Class decorator: make a weight method known by its ``name``.

    Raises:
        InvalidConfig: it is no frozen dataclass with a name.

    >>> register_weight_method(WeightMethod)
    Traceback (most recent call last):
    torch_quant.errors.InvalidConfig: WeightMethod: it has no name, or is no frozen dataclass
    """
    WEIGHT_METHODS[_checked(cls, WEIGHT_METHODS)] = cls
    return cls


def register_transform(cls: T) -> T:
    """Class decorator: make a transform known by its ``name``; raises as the other does.

    >>> from torch_quant import SmoothQuant
    >>> register_transform(SmoothQuant) is TRANSFORMS["smoothquant"]
    True
    """
    TRANSFORMS[_checked(cls, TRANSFORMS)] = cls
    return cls


def _checked(cls: type[Method], known: Mapping[str, type[Method]]) -> str:
    frozen = is_dataclass(cls) and "__setattr__" in vars(cls)
    if not frozen or not getattr(cls, "name", ""):
        raise InvalidConfig(f"{cls.__qualname__}: it has no name, or is no frozen dataclass")
    other = known.get(cls.name, cls)
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise InvalidConfig(f"{cls.__qualname__}: {cls.name!r} is taken by {other.__qualname__}")
    return cls.name


def read_weight_method(data: Any) -> WeightMethod:
    """A weight method from its name, or what :meth:`Method.to_dict` gave.

    Raises:
        InvalidConfig: it is unknown, or an option is unknown or wrong.
    """
    return read_member(data, WEIGHT_METHODS, "weight method")


def read_transform(data: Any) -> Transform:
    """A transform from its name, or what :meth:`Method.to_dict` gave; raises as the other does."""
    return read_member(data, TRANSFORMS, "transform")
