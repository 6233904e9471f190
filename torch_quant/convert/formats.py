"""What a ``state_dict`` of a quantized model has to agree with, beside names and sizes.

Tensors of equal sizes may be integers of other formats, and scales may be numbers in the graphs. So
the metadata of each ``state_dict`` says what graphs read it, and a model takes it if its own are
the same. Keys are the tensors alone.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from torch_quant.core.naming import matches_name
from torch_quant.core.plan import PRECISIONS, QuantPlan
from torch_quant.errors import InvalidConfig
from torch_quant.ops.functions import operator_name, path_of

__all__ = ["Formats", "fingerprint"]

_ENTRY = "torch_quant"
"""Of a module's metadata in a ``state_dict``."""
_ANOTHER = (
    "{} was given a state_dict of another model: {}. Give it that of a model with the same layers "
    "and sizes"
)
_KEEP = "torch_quant.save keeps all of a model, quantizer.save what quantizing again needs"


def fingerprint(body: fx.GraphModule) -> str:
    """The same for graphs that compute the same of tensors of the same names, sizes and formats."""
    lines = []
    numbers = {node: f"%{i}" for i, node in enumerate(body.graph.nodes)}
    for node in body.graph.nodes:
        target = node.target if isinstance(node.target, str) else operator_name(node.target)
        given: Any = fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__)
        lines.append(f"{node.op} {target or path_of(node.target)} {given!r}")
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(body)
            if isinstance(value, Tensor):
                lines.append(f"{value.dtype} {tuple(value.shape)}")
            elif isinstance(value, fx.GraphModule):
                lines.append(fingerprint(value))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass
class Formats:
    """Of one quantized model, which its modules share.

    Args:
        backend: its name.
        sites: site -> formats, in words.
        graphs: path of a module -> fingerprints of its graphs.
        refusal: why it takes no values, empty if it does.
        lower: sites that are not quantized -> the precision that they are computed in.
    """

    backend: str
    sites: dict[str, str]
    graphs: dict[str, list[str]] = field(default_factory=dict)
    refusal: str = ""
    lower: dict[str, str] = field(default_factory=dict)
    loaded: bool = False
    """Whether it has values that are not those of the float model any more."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Models that were pickled by earlier versions lack what came since."""
        vars(self).update({"lower": {}, **state})

    @staticmethod
    def of_sites(plan: QuantPlan) -> dict[str, str]:
        """Sites that are quantized -> formats."""
        return {name: plan[name].format for name in plan.quantized}

    @staticmethod
    def of_lower(plan: QuantPlan) -> dict[str, str]:
        """Sites that are computed in fewer bits than float32 and not quantized -> their type."""
        lower = {name: site.precision for name, site in plan.items() if not site.quantized}
        return {name: precision for name, precision in lower.items() if precision != PRECISIONS[0]}

    def inside(self, path: str, lower: bool = False) -> list[str]:
        """Formats of the sites in the module at ``path``, each once.

        Args:
            path: of the module.
            lower: those that are in fewer bits than float32, and not quantized.
        """
        known = self.lower if lower else self.sites
        return list(dict.fromkeys(x for name, x in known.items() if matches_name(name, path)))

    def note(self, path: str, body: fx.GraphModule) -> None:
        """Count a graph of the module at ``path`` in."""
        self.graphs.setdefault(path, []).append(fingerprint(body))

    def describe(self, metadata: dict[str, Any]) -> None:
        """Write down what a ``state_dict`` is of, in the metadata of one module."""
        graphs = {path: list(found) for path, found in self.graphs.items()}
        metadata[_ENTRY] = {"backend": self.backend, "sites": self.sites, "graphs": graphs}

    def check(
        self,
        metadata: Mapping[str, Any],
        where: str,
        given: Mapping[str, Any],
        own: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """Raise :class:`InvalidConfig` unless the values fit.

        Args:
            metadata: of the module, in the ``state_dict``.
            where: the module.
            given: the values, by their names in the module.
            own: gives what the module has in their places.
        """
        if self.refusal:
            raise InvalidConfig(f"{where} takes no state_dict: {self.refusal}. {_KEEP}")
        found = metadata.get(_ENTRY)
        if not isinstance(found, Mapping):
            raise InvalidConfig(
                f"{where} was given a state_dict that does not say which formats its tensors have: "
                "it takes what quant_model.state_dict() returned, as it is; a dictionary made of "
                f"it, or a file of tensors alone, has no metadata. {_KEEP}"
            )
        for name in {**self.sites, **found["sites"]}:
            ours, theirs = self.sites.get(name, "float"), found["sites"].get(name, "float")
            if ours != theirs:
                here, there = (_has(name, values) for values in (own(), given))
                if here != there:
                    which = "lacks" if here else "has"
                    raise InvalidConfig(_ANOTHER.format(where, f"it {which} {name}"))
                raise InvalidConfig(
                    f"{where} was given a state_dict of other formats: {name} is {theirs} there; "
                    f"expected {ours}. Quantize both models by one configuration"
                )
        for path, ours_ in self.graphs.items():
            if not set(ours_) <= set(found["graphs"].get(path, ())):
                same = found["backend"] == self.backend
                if same and (sizes := _other_sizes(own(), given)):
                    raise InvalidConfig(_ANOTHER.format(where, sizes))
                backends = "" if same else f" ({found['backend']} there, {self.backend} here)"
                raise InvalidConfig(
                    f"{where} was given a state_dict of other graphs, at {path or 'the root'}: "
                    f"scales of activations may be numbers in them{backends}. Quantize both models "
                    f"for one backend, with the same ranges and kinds of calls. {_KEEP}"
                )


def _has(layer: str, values: Mapping[str, Any]) -> bool:
    return any(name.startswith(f"{layer}.") for name in values)


def _other_sizes(own: Mapping[str, Tensor], given: Mapping[str, Any]) -> str:
    """The first tensor that is of another size there, in words; empty if there is none."""
    for name, ours in own.items():
        theirs = given.get(name)
        if isinstance(theirs, Tensor) and theirs.shape != ours.shape and theirs.dtype == ours.dtype:
            return f"{name} is {tuple(theirs.shape)} there; expected {tuple(ours.shape)}"
    return ""
