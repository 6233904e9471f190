"""Settings of PyTorch's own quantization: qconfig mappings, models with qconfigs, PT2E quantizers.

Nothing of ``torch.ao`` or ``torchao`` is imported: objects are read by their attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from torch_quant.config import OverrideKey, QConfig
from torch_quant.errors import InvalidConfig
from torch_quant.migrate.ao_formats import pair_of, read_pair
from torch_quant.migrate.names import class_key, prefix_pattern
from torch_quant.migrate.result import Migration, Rows
from torch_quant.ops.table import OPERATORS

__all__ = ["from_torch_ao"]

_OPERATOR_SETTINGS = ("operator_type_qconfig", "operator_type_config")
_NAME_SETTINGS = ("module_name_qconfig", "module_name_config")
_CLASS_SETTINGS = ("module_type_qconfig", "module_type_config")


class _Activation:
    """What ``default_dynamic_qconfig`` of torch.ao observes of activations."""

    dtype, qscheme, quant_min, quant_max = torch.quint8, torch.per_tensor_affine, 0, 255
    is_dynamic = True


class _Weight:
    """The same of weights."""

    dtype, qscheme, quant_min, quant_max = torch.qint8, torch.per_tensor_symmetric, -128, 127


_DYNAMIC = SimpleNamespace(activation=_Activation, weight=_Weight)


def from_torch_ao(source: Any) -> Migration:
    """The settings of a ``QConfigMapping``, of a model whose modules have a ``qconfig``, of a
    quantizer of PT2E (``X86InductorQuantizer``), of one ``QConfig``, or what
    ``torch.ao.quantization.quantize_dynamic`` is given: a set of classes and names, or a dict with
    the ``QConfig`` of each.

    Args:
        source: one of these. A set stands for that function's default, ``dtype=torch.qint8``.

    Raises:
        InvalidConfig: it is none of them, or leaves everything in float; codes have other than 8
            bits.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> class Observer:  # as torch.ao.quantization.MinMaxObserver is read
    ...     dtype, qscheme, quant_min, quant_max = torch.quint8, torch.per_tensor_affine, 0, 127
    >>> from_torch_ao(SimpleNamespace(activation=Observer, weight=Observer)).qconfig.input.quant_max
    127
    """
    listed = isinstance(source, (Set, Mapping)) and not hasattr(source, "global_qconfig")
    reading = _Reading("quantize_dynamic" if listed else type(source).__name__)
    if isinstance(source, nn.Module):
        reading.module(source)
    elif hasattr(source, "global_qconfig") and hasattr(source, "module_name_qconfigs"):
        reading.mapping(source)
    elif hasattr(source, "global_config"):
        reading.quantizer(source)
    elif listed:
        reading.listed(source)
    else:
        reading.add(None, source, "")
    return reading.done()


@dataclass
class _Reading:
    """Settings on their way, from the least specific to the most.

    Args:
        what: what messages call the source.
    """

    what: str
    rows: Rows = field(default_factory=Rows)
    whole: QConfig | None = None
    overrides: dict[OverrideKey, QConfig | None] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)
    alike: list[str] = field(default_factory=list)

    def add(self, key: OverrideKey | None, given: Any, place: str) -> None:
        """Take what is given for ``key``, None for everything."""
        found = None
        if given is not None:
            found = read_pair(*pair_of(given, place or self.what), place, self.rows)
        elif key is not None:
            self.rows.same(f"{place}None", "float")
        if key is None:
            self.whole = found
        else:
            self.overrides.pop(key, None)
            self.overrides[key] = found

    def kind(self, kind: Any, given: Any, *, whole: bool = False) -> None:
        """Take what is given for a class, a function, a method or an operator.

        Args:
            kind: one of these.
            given: its setting.
            whole: whether there a class stands for what is inside of its children as well.
        """
        key = class_key(kind) or _operator_key(kind)
        name = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
        own = _is_own(kind)
        if own and key is None:
            self.rows.left_out(
                name,
                "it was defined inside of a function, so no path leads to it: define it at the top "
                "of its module, or name its layers in overrides",
            )
            return
        if key is None or not (own or key.startswith("op:") or _has_weight(key)):
            self.other.append(name)
            return
        reading = _Reading(self.what)
        reading.add(key, given, f"{name}: ")
        if reading.overrides[key] == self.whole and self.whole is not None:
            self.alike.append(name)  # a default mapping lists many
        elif _has_modules(kind, key):  # the other tool's keeps modules apart
            self.rows.left_out(
                f"{name}: {'None' if given is None else 'a setting'}",
                f"there it is for calls of the function alone, and {key!r} is for modules "
                "too: name the sites in overrides, quantizer.coverage(model) lists them",
            )
            return
        elif own and not whole and not _has_layer(kind):
            self.rows.differs(
                f"{name}: {'None' if given is None else 'a setting'}",
                key,
                "here it is for the layers inside of it too, there for the functions it calls",
            )
        else:
            self.rows.found += reading.rows.found
        self.overrides.pop(key, None)
        self.overrides |= reading.overrides

    def mapping(self, source: Any) -> None:
        """A ``QConfigMapping``."""
        self.add(None, source.global_qconfig, "")
        for kind, given in source.object_type_qconfigs.items():
            self.kind(kind, given)
        for expression, given in reversed(source.module_name_regex_qconfigs.items()):
            key = prefix_pattern(expression, f"{self.what}: {expression!r}")
            self.add(key, given, f"{expression!r}: ")  # there, the first that matches holds
        for name, given in source.module_name_qconfigs.items():
            if name:
                self.add(name, given, f"{name}: ")
            else:
                self.add(None, given, "the model: ")
        for entry in source.module_name_object_type_order_qconfigs:
            name, kind, index = entry
            self.rows.left_out(
                f"{name}, {getattr(kind, '__name__', kind)}, {index}",
                f"name the site in an override: quantizer.coverage(model) lists those in {name!r}",
            )

    def module(self, model: nn.Module) -> None:
        """A model whose modules have a ``qconfig``, as eager mode wants it."""
        given = {
            name: module.__dict__.get("qconfig", getattr(type(module), "qconfig", None))
            for name, module in model.named_modules()
            if "qconfig" in module.__dict__ or hasattr(type(module), "qconfig")
        }
        if not given:
            raise InvalidConfig(
                f"no module of {self.what} has a qconfig; set one, as in model.qconfig = "
                "torch.ao.quantization.get_default_qconfig('x86')"
            )
        self.add(None, given.pop("", None), "")
        for name, each in given.items():
            self.add(name, each, f"{name}: ")

    def listed(self, source: Set[Any] | Mapping[Any, Any]) -> None:
        """What is quantized at each call, as ``quantize_dynamic`` has it."""
        for kind in source:
            given = source[kind] if isinstance(source, Mapping) else _DYNAMIC
            if kind == "":
                self.add(None, given, "")
            elif isinstance(kind, str):
                self.add(kind, given, f"{kind}: ")
            else:
                self.kind(kind, given, whole=True)

    def quantizer(self, source: Any) -> None:
        """A quantizer of PT2E."""
        self.add(None, source.global_config, "")
        for names in (_OPERATOR_SETTINGS, _CLASS_SETTINGS):
            for kind, given in _settings(source, names).items():
                self.kind(kind, given, whole=names is _CLASS_SETTINGS)
        for name, given in _settings(source, _NAME_SETTINGS).items():
            self.add(name, given, f"{name}: ")

    def done(self) -> Migration:
        """The whole."""
        if self.alike:
            listed = ", ".join(dict.fromkeys(self.alike))
            self.rows.same(f"types: {listed}", "as everything else")
        if self.other:
            listed = ", ".join(dict.fromkeys(self.other))
            self.rows.no_effect(
                f"types without a product: {listed}",
                "they stay in float, and run beside integers without a scale of their own",
            )
        chosen = next((x for x in (self.whole, *self.overrides.values()) if x is not None), None)
        if chosen is None:
            raise InvalidConfig(f"{self.what} leaves everything in float: there is nothing to do")
        overrides = self.overrides
        if self.whole is None:  # only what is listed is quantized
            rest: dict[OverrideKey, QConfig | None] = dict.fromkeys(f"op:{x}" for x in OPERATORS)
            overrides = rest | overrides
        self.rows.differs(
            "the layers of the tool",
            "everything that can be quantized",
            "products of two activations and embeddings too, and no activation functions or sums",
        )
        rows = tuple(self.rows.found)
        return Migration(f"{self.what}, PyTorch's own", chosen, overrides, rows=rows)


def _operator_key(kind: Any) -> str | None:
    """The key for an overload of ``torch.ops.aten``."""
    found = (name for name, row in OPERATORS.items() if kind in row.targets)
    name = next(found, None)
    return None if name is None else f"op:{name}"


def _is_own(kind: Any) -> bool:
    """Whether it is a module class of the user's, and none of PyTorch."""
    return (
        isinstance(kind, type)
        and issubclass(kind, nn.Module)
        and kind.__module__.partition(".")[0] != "torch"
    )


def _has_layer(kind: type) -> bool:
    """Whether a class is derived from a layer of torch.nn that has a weight."""
    return any(
        each.__module__.startswith("torch.nn.") and _has_weight(each.__name__)
        for each in kind.__mro__
    )


def _has_modules(kind: Any, key: str) -> bool:
    """Whether ``kind`` is a function whose operator modules of torch.nn have as well."""
    function = callable(kind) and not isinstance(kind, (type, torch._ops.OpOverload))
    row = OPERATORS.get(key.removeprefix("op:"))
    return function and row is not None and row.weight is not None


def _has_weight(key: str) -> bool:
    """Whether a class of torch.nn computes products with a weight, by its name."""
    name = key.rpartition(".")[2].lower()
    return any(name.replace("cell", "") in row.replace("_", "") for row in OPERATORS) or any(
        word in name for word in ("attention", "transformer")
    )


def _settings(source: Any, names: tuple[str, ...]) -> Mapping[Any, Any]:
    found = (getattr(source, name, None) for name in names)
    return next((each for each in found if isinstance(each, Mapping)), {})
