"""The single truth of what is quantized and how: one immutable entry for each site."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch_quant.core.elements import IntegerType
from torch_quant.core.kernels import KernelTable
from torch_quant.core.methods import (
    Transform,
    WeightMethod,
    read_transform,
    read_weight_method,
)
from torch_quant.core.spec import FLOAT, QuantSpec
from torch_quant.errors import InvalidConfig

__all__ = [
    "FALLEN_BACK",
    "LOWER",
    "PRECISIONS",
    "FloatOp",
    "SLOWER",
    "QuantPlan",
    "SitePlan",
    "is_share",
]

PRECISIONS = ("float32", "bfloat16")
"""Arithmetic that a site outside int8 may run in."""
FALLEN_BACK = "fallen back"
"""The reason of a site that sensitivity analysis took back to float."""
LOWER = "as configured"
"""The reason of a site that is to be in a lower float precision instead of integers."""
SLOWER = "slower quantized"
"""How the reason of a site begins that was measured to be faster in float."""


def is_share(value: Any) -> bool:
    """Whether ``value`` is a number from 0 to 1."""
    return isinstance(value, (int, float)) and 0 <= value <= 1


@dataclass(frozen=True)
class SitePlan:
    """What is done with one site.

    Args:
        name: the site.
        op: its op type.
        inputs: keys of the tensors to quantize, those inside the operator last.
        activation: their format, None where they stay in float, or there are none.
        weight: format of the weight, None where it stays in float, or there is none.
        quantized: False leaves the site in float.
        reason: why it stays in float, empty if quantized.
        macs: multiply-accumulates on the captured example.
        precision: ``"float32"`` or ``"bfloat16"``, the arithmetic of a site that stays in float.
        quantized_output: key of its result, or of that behind a rectifier, where it is quantized as
            well; else empty.
        transforms: what is done to the graph before, to make it easier to quantize.
        method: how the weight is rounded, None for the default.

    Raises:
        InvalidConfig: another precision.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    activation: QuantSpec | None = None
    weight: QuantSpec | None = None
    quantized: bool = True
    reason: str = ""
    macs: int = 0
    precision: str = "float32"
    quantized_output: str = ""
    transforms: tuple[Transform, ...] = ()
    method: WeightMethod | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            expected = " or ".join(PRECISIONS)
            raise InvalidConfig(f"{self.name}: precision {self.precision!r}; expected {expected}")

    @property
    def needs_ranges(self) -> bool:
        """Whether calibration has to find ranges of its activations.

        >>> SitePlan("head", "linear", activation=QuantSpec.of(dynamic=True)).needs_ranges
        False
        """
        return self.activation is not None and not self.activation.dynamic

    @property
    def format(self) -> str:
        """What its numbers are if it is quantized, in words that reports use.

        >>> SitePlan("head", "linear", ("x",), weight=QuantSpec.of("int4")).format
        'int4 weights'
        >>> SitePlan("head", "linear", ("x",), QuantSpec(), QuantSpec.of("int8")).format
        'int8'
        """
        if self.activation is None:
            word = "int8" if self.weight is None else _word(self.weight)
            return f"{word} weights" if self.inputs else word
        activation = _word(self.activation)
        weight = activation if self.weight is None else _word(self.weight)
        return weight if weight == activation else f"{weight} weights, {activation} activations"

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` reads, ready for JSON.

        >>> SitePlan("head", "linear").to_dict()["op"]
        'linear'
        """
        data = dict(vars(self))
        for name in ("activation", "weight"):
            spec = getattr(self, name)
            data[name] = None if spec is None else spec.to_dict()
        data["inputs"] = list(self.inputs)
        data["transforms"] = [each.to_dict() for each in self.transforms]
        data["method"] = None if self.method is None else self.method.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SitePlan:
        """Read :meth:`to_dict`; raises :class:`InvalidConfig` for something else.

        >>> site = SitePlan("head", "linear", weight=QuantSpec())
        >>> SitePlan.from_dict(site.to_dict()) == site
        True
        """
        values = dict(data)
        try:
            for name in ("activation", "weight"):
                spec = values.get(name)
                values[name] = None if spec is None else QuantSpec.from_dict(spec)
            values["inputs"] = tuple(values.get("inputs", ()))
            values["transforms"] = tuple(map(read_transform, values.get("transforms", ())))
            if (method := values.get("method")) is not None:
                values["method"] = read_weight_method(method)
            return cls(**values)
        except TypeError as error:
            raise InvalidConfig(f"not a SitePlan: {dict(data)!r} ({error})") from error


def _phrase(format_: str) -> str:
    return f"{'with' if ' ' in format_ else 'in'} {format_}"


def _word(spec: QuantSpec) -> str:
    if not isinstance(spec.element, IntegerType):
        return spec.element.name
    # CPUs without VNNI run int8 kernels on codes of 7 bits.
    return "int8" if spec.bits == 7 else f"int{spec.bits}"


@dataclass(frozen=True)
class FloatOp:
    """An operator that multiplies and is no site, so that it stays in float.

    Args:
        name: where it runs.
        op: the operator.
        macs: its multiply-accumulates on the captured example.
        reason: why it is no site.
    """

    name: str
    op: str
    macs: int
    reason: str


class QuantPlan(Mapping[str, SitePlan]):
    """Sites in the order they run, by name.

    Args:
        sites: what is done with each.
        float_ops: what else multiplies in the model.
    """

    def __init__(self, sites: Iterable[SitePlan] = (), float_ops: Iterable[FloatOp] = ()) -> None:
        self._sites = {site.name: site for site in sites}
        self.float_ops = tuple(float_ops)

    def __getitem__(self, name: str) -> SitePlan:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the sites that run quantized."""
        return tuple(name for name, site in self.items() if site.quantized)

    @property
    def reduced(self) -> tuple[str, ...]:
        """Names of the sites that are not in float32: quantized, or in bfloat16.

        >>> QuantPlan([SitePlan("a", "linear", quantized=False, precision="bfloat16")]).reduced
        ('a',)
        """
        return tuple(n for n, site in self.items() if site.quantized or site.precision != "float32")

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the captured example, of sites and of all else."""
        return sum(site.macs for site in self.values()) + sum(op.macs for op in self.float_ops)

    @property
    def coverage(self) -> float:
        """Share of all multiply-accumulates that run quantized, 0 to 1."""
        return sum(self.formats.values())

    @property
    def formats(self) -> dict[str, float]:
        """Format of sites, in words -> share of all multiply-accumulates, 0 to 1, largest first.

        >>> weight = QuantSpec.of("int4")
        >>> QuantPlan([SitePlan("head", "linear", ("x",), weight=weight, macs=8)]).formats
        {'int4 weights': 1.0}
        """
        total = self.macs
        found: dict[str, int] = {}
        for site in (self[name] for name in self.quantized):
            found[site.format] = found.get(site.format, 0) + site.macs
        largest = sorted(found.items(), key=lambda each: -each[1])
        return {name: macs / total if total else 0.0 for name, macs in largest}

    @property
    def summary(self) -> str:
        """The share and the counts, for headlines."""
        count = len(self.float_ops)
        rest = f", and {count} other product{'s' if count > 1 else ''} in float" if count else ""
        formats = {name: share for name, share in self.formats.items() if share} or self.formats
        if len(formats) > 1:
            kinds = ", ".join(f"{share:.1%} {_phrase(name)}" for name, share in formats.items())
            how = f"quantized ({kinds})"
        else:
            how = _phrase(next(iter(formats), "int8"))
        share, count = self.coverage, len(self.quantized)
        lower = [site for site in self.values() if site.precision != PRECISIONS[0]]
        if lower and not count:
            share, count, how = self._share(lower), len(lower), f"in {lower[0].precision}"
        elif lower:
            rest = f", {self._share(lower):.1%} in {lower[0].precision}{rest}"
        return f"{share:.1%} of the multiply-accumulates {how}, {count} of {len(self)} sites{rest}"

    def _share(self, sites: Iterable[SitePlan]) -> float:
        """Of all multiply-accumulates, 0 to 1."""
        return sum(site.macs for site in sites) / (self.macs or 1)

    def without(
        self,
        names: Iterable[str],
        reason: str = FALLEN_BACK,
        precision: str = "float32",
        *,
        reduced: bool = False,
    ) -> QuantPlan:
        """A new plan with ``names`` in float.

        Args:
            names: sites; one that is in float already keeps its reason.
            reason: why, for reports.
            precision: the arithmetic they run in.
            reduced: change sites in bfloat16 as well.

        Raises:
            InvalidConfig: an unknown name.

        >>> plan = QuantPlan([SitePlan("query", "linear"), SitePlan("head", "linear")])
        >>> plan.without(["head"]).quantized
        ('query',)
        """
        names = set(names)
        if unknown := names - set(self):
            raise InvalidConfig(f"no site is called {', '.join(sorted(unknown))}")
        those = names.intersection(self.reduced if reduced else self.quantized)
        sites = (
            replace(site, quantized=False, reason=reason, precision=precision, transforms=())
            if name in those
            else site
            for name, site in self.items()
        )
        return QuantPlan(sites, self.float_ops)

    def declined(self, reasons: Mapping[str, str]) -> QuantPlan:
        """A new plan in which the sites that ``reasons`` names run in float, for these reasons.

        >>> plan = QuantPlan([SitePlan("query", "linear"), SitePlan("head", "linear")])
        >>> plan.declined({"head": "too small"})["head"].reason
        'too small'
        """
        sites = (
            replace(site, quantized=False, reason=reasons[name])
            if name in reasons and site.quantized
            else site
            for name, site in self.items()
        )
        return QuantPlan(sites, self.float_ops)

    def of(self, names: Collection[str], float_ops: Iterable[FloatOp]) -> QuantPlan:
        """The part of it that covers ``names``, with these operators beside them.

        >>> plan = QuantPlan([SitePlan("query", "linear"), SitePlan("head", "linear")])
        >>> list(plan.of(["head"], ()))
        ['head']
        """
        return QuantPlan((site for name, site in self.items() if name in names), float_ops)

    def joined(self, others: Iterable[QuantPlan]) -> QuantPlan:
        """A new plan with what ``others`` have and this one lacks behind its own.

        >>> query, head = (QuantPlan([SitePlan(name, "linear")]) for name in ("query", "head"))
        >>> list(query.joined([head]))
        ['query', 'head']
        """
        sites = dict(self._sites)
        float_ops = {op.name: op for op in self.float_ops}
        for other in others:
            sites |= {name: site for name, site in other.items() if name not in sites}
            float_ops |= {op.name: op for op in other.float_ops if op.name not in float_ops}
        return QuantPlan(sites.values(), float_ops.values())

    def edited(self, edits: QuantPlan, kernels: KernelTable) -> QuantPlan:
        """A new plan with the formats and decisions of ``edits``, where the backend can follow.

        A site of ``edits`` that says float stays in float; one that says int8 gets its formats,
        unless this plan has it in float because the backend cannot run it.

        >>> edits = QuantPlan([SitePlan("head", "linear", quantized=False, reason="by hand")])
        >>> plan = QuantPlan([SitePlan("head", "linear")])
        >>> plan.edited(edits, KernelTable("none", ()))["head"].reason
        'by hand'
        """
        plan = []
        for name, site in self.items():
            edit = edits._sites.get(name)
            if edit is None:
                plan.append(site)
            elif not edit.quantized:
                reason = edit.reason or "left in float by the summary"
                plan.append(replace(site, quantized=False, reason=reason, precision=edit.precision))
            else:
                # A site without inputs has a format where this backend stores results.
                activation = edit.activation if site.inputs else site.activation
                inputs = FLOAT if site.inputs else None
                weight = None if site.weight is None else FLOAT
                wished = activation or inputs, edit.weight or weight
                kernel, refusal = kernels.choose(site.op, *wished)
                reason = site.reason or refusal
                able = kernel is not None and kernel.row_scales
                transforms = (each for each in edit.transforms if able or not each.row_scales)
                plan.append(
                    replace(
                        site,
                        activation=activation,
                        weight=edit.weight,
                        quantized=not reason,
                        reason=reason,
                        transforms=tuple(transforms),
                        method=edit.method,
                    )
                )
        return QuantPlan(plan, self.float_ops)

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` reads, ready for JSON.

        >>> sorted(QuantPlan().to_dict())
        ['float_ops', 'sites']
        """
        return {
            "sites": [site.to_dict() for site in self.values()],
            "float_ops": [asdict(op) for op in self.float_ops],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantPlan:
        """Read :meth:`to_dict`.

        >>> plan = QuantPlan([SitePlan("query", "linear"), SitePlan("head", "linear")])
        >>> list(QuantPlan.from_dict(plan.to_dict()))
        ['query', 'head']
        """
        sites = [SitePlan.from_dict(site) for site in data["sites"]]
        return cls(sites, [FloatOp(**op) for op in data.get("float_ops", ())])

    def __repr__(self) -> str:
        return f"QuantPlan({self.summary})"
