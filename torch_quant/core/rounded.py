"""Weights that were rounded with data, a block of the model at a time, and how they were scaled."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_quant.core.lending import by_itself, unshared, was_changed
from torch_quant.core.methods import WeightMethod, read_weight_method
from torch_quant.core.packing import pack_codes, unpack_codes
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig

__all__ = ["RoundedWeight", "RoundedWeights", "Scaling", "checksum"]


def checksum(x: Tensor) -> int:
    """A number for the values of a tensor.

    >>> checksum(torch.zeros(2)) == checksum(torch.ones(2))
    False
    """
    values: Any = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(values)


@dataclass(frozen=True)
class Scaling:
    """What a parameter is multiplied by, so that the tensor between two layers is easier to round.

    Args:
        rows: shape ``[out]``, of the first dimension; None for ones.
        columns: shape ``[in]``, of the last dimension of a matrix; None for ones.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """A scaled copy of the parameter ``x``, ``[out, in]`` or ``[out]``.

        >>> Scaling(rows=torch.tensor([2.0])).apply(torch.ones(1, 2))
        tensor([[2., 2.]])
        """
        if self.rows is not None:
            x = x * self.rows.reshape(-1, *([1] * (x.dim() - 1)))
        return x if self.columns is None else x * self.columns

    def then(self, rows: Tensor | None, columns: Tensor | None) -> Scaling:
        """This one, followed by another.

        >>> Scaling(rows=torch.tensor([2.0])).then(torch.tensor([3.0]), None).rows
        tensor([6.])
        """
        return Scaling(_product(self.rows, rows), _product(self.columns, columns))


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b


@dataclass(frozen=True)
class RoundedWeight:
    """The codes of one site's weight.

    Args:
        packed: codes as :func:`pack_codes` lays them out.
        qparams: what they stand for.
        shape: of the weight, ``(out, in)``.
        method: what rounded it.
        checksum: of the float weight that it was rounded from.
    """

    packed: Tensor
    qparams: QParams
    shape: tuple[int, ...]
    method: WeightMethod
    checksum: int

    @classmethod
    def of(
        cls, codes: Tensor, qparams: QParams, method: WeightMethod, checksum: int
    ) -> RoundedWeight:
        """Of codes in ``qparams.spec.dtype``, one an element."""
        packed = pack_codes(codes, qparams.spec)
        scale, zero_point = by_itself(qparams.scale), by_itself(qparams.zero_point)
        qparams = QParams(qparams.spec, scale, zero_point)
        return cls(by_itself(packed), qparams, tuple(codes.shape), method, checksum)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Packed codes, scales and zero points."""
        return self.packed, self.qparams.scale, self.qparams.zero_point

    @property
    def codes(self) -> Tensor:
        """One code an element, in ``qparams.spec.dtype``."""
        return unpack_codes(self.packed, self.shape, self.qparams.spec)


@dataclass
class RoundedWeights:
    """All of them, of one model.

    Args:
        sites: by site.
        scaled: by the name of a parameter: what it is multiplied by in the quantized model.
        left_out: sites that are rounded to nearest, as their weight is no parameter by itself.
    """

    sites: dict[str, RoundedWeight] = field(default_factory=dict)
    scaled: dict[str, Scaling] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.sites)

    def tensors(self) -> list[Tensor]:
        """All that the sites have."""
        return [x for each in self.sites.values() for x in each.tensors]

    def check(self, site: str) -> None:
        """Raise :class:`InvalidConfig` if a quantized model's owner has written to what is lent."""
        if any(map(was_changed, self.sites[site].tensors)):
            raise InvalidConfig(
                f"the codes of {site} were written to, in a quantized model that computes with "
                "the quantizer's own: run quantizer.round_weights(model, batches) again; "
                "quant_model.load_state_dict(...) and copies of a model do not reach the quantizer"
            )

    def copied(self) -> RoundedWeights:
        """A copy that later changes do not reach; tensors are shared."""
        return RoundedWeights(dict(self.sites), dict(self.scaled), self.left_out)

    def update(self, other: RoundedWeights) -> None:
        """Take in what another has; where both have a site, the other's holds."""
        self.sites |= other.sites
        self.scaled |= other.scaled

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors.

        >>> RoundedWeights().state_dict()
        {'left_out': [], 'sites': {}, 'scaled': {}}
        """
        for site in self.sites:
            self.check(site)
        return {
            "left_out": list(self.left_out),
            "sites": {
                name: {
                    "codes": each.packed,
                    "scale": each.qparams.scale,
                    "zero_point": each.qparams.zero_point,
                    "spec": each.qparams.spec.to_dict(),
                    "shape": list(each.shape),
                    "method": each.method.to_dict(),
                    "checksum": each.checksum,
                }
                for name, each in self.sites.items()
            },
            "scaled": {
                name: {
                    key: value
                    for key, value in (("rows", each.rows), ("columns", each.columns))
                    if value is not None
                }
                for name, each in self.scaled.items()
            },
        }

    @classmethod
    def from_state(cls, state: Any) -> RoundedWeights:
        """Read :meth:`state_dict`; raises :class:`InvalidConfig` that names what is wrong."""
        if not isinstance(state, Mapping) or set(state) != {"sites", "scaled", "left_out"}:
            raise InvalidConfig("'rounded' is no mapping with 'sites', 'scaled' and 'left_out'")
        left_out = state["left_out"]
        if not isinstance(left_out, list) or not all(isinstance(x, str) for x in left_out):
            raise InvalidConfig("'left_out' of 'rounded' is no list of names")
        sites = {name: _read(name, each) for name, each in _items(state, "sites")}
        scaled = {}
        for name, each in _items(state, "scaled"):
            if set(each) - {"rows", "columns"} or not all(
                isinstance(x, Tensor) and x.dim() == 1 for x in each.values()
            ):
                raise InvalidConfig(f"'scaled' has {list(each)} for {name!r}; expected vectors")
            scaled[name] = Scaling(**each)
        return cls(sites, scaled, tuple(left_out))


_ENTRIES = {"codes", "scale", "zero_point", "spec", "shape", "method", "checksum"}


def _items(state: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    found = state[key]
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(each, Mapping) for name, each in found.items()
    ):
        raise InvalidConfig(f"{key!r} of 'rounded' is no mapping of names to entries")
    return list(found.items())


def _read(name: str, data: Mapping[str, Any]) -> RoundedWeight:
    if set(data) != _ENTRIES:
        wrong = ", ".join(sorted(set(data) ^ _ENTRIES))
        raise InvalidConfig(f"the rounded weight of {name!r}: wrong or missing {wrong}")
    given = [data[key] for key in ("codes", "scale", "zero_point")]
    if not all(isinstance(x, Tensor) for x in given):
        raise InvalidConfig(f"the rounded weight of {name!r}: codes and scales are no tensors")
    tensors = [unshared(x) for x in given]
    try:
        spec = QuantSpec.from_dict(data["spec"])
        shape = tuple(int(size) for size in data["shape"])
        qparams = QParams(spec, tensors[1], tensors[2])
        if tuple(tensors[1].shape) != spec.granularity.grid(shape):
            raise InvalidConfig(
                f"scales of shape {list(tensors[1].shape)} for a weight of shape {list(shape)}; "
                f"expected {list(spec.granularity.grid(shape))}"
            )
        unpack_codes(tensors[0], shape, spec)
        method = read_weight_method(data["method"])
        return RoundedWeight(tensors[0], qparams, shape, method, int(data["checksum"]))
    except (InvalidConfig, TypeError, ValueError, RuntimeError) as error:
        raise InvalidConfig(f"the rounded weight of {name!r}: {error}") from error
