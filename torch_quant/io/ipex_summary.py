"""Read the summary that IPEX's own ``save_qconf_summary`` writes, and write it as ours.

IPEX keys operators by module and index, and gives each input a scale, a zero point and the type it
runs in. Operators are matched to sites by module name; those without a module of their own by the
module they run in, the operator and their order. Weight scales are not taken: they follow from the
weights.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.io.summary import write_summary

__all__ = ["convert_ipex_summary", "read_ipex_summary"]

_SPECS = {
    "torch.quint8": QuantSpec.of(),
    "torch.qint8": QuantSpec.of(signed=True, symmetric=True),
}
_ABSENT = "not in the IPEX summary"


@dataclass(frozen=True)
class _Operator:
    """One operator of an IPEX summary."""

    module: str
    index: str
    kind: str
    name: str
    inputs: tuple[Mapping[str, Any], ...]

    def __str__(self) -> str:
        return f"{self.name or self.module or '(root)'}, operator {self.index}: {self.kind}"


def _operators(data: Mapping[str, Any]) -> Iterator[_Operator]:
    for module, entry in data.items():
        path = module.strip()
        for index, info in entry["q_op_infos"].items():
            kind = _kind(str(info["op_type"]))
            own = info.get("fqn", "") if info.get("op_type_is_module") else ""
            name = ".".join(part for part in (path, own) if part) if own else ""
            if own and (own == path or own.startswith(f"{path}.")):
                name = own  # given from the root
            inputs = tuple(tensor for tensor in info["input_tensor_infos"] if tensor)
            yield _Operator(path, index, kind, name, inputs)


def _kind(text: str) -> str:
    """``<class 'torch.nn.ReLU'>``, ``<built-in method matmul of ...>`` -> ``ReLU``, ``matmul``."""
    found = re.search(r"'([\w.]+)'|(?:method|function) ([\w.]+)", text)
    if found is None:
        raise ValueError(f"operator type {text!r}")
    return (found[1] or found[2]).rpartition(".")[2]


def _range(tensor: Mapping[str, Any], spec: QuantSpec) -> list[float]:
    """The values that a grid covers."""
    scale, zero_point = float(tensor["scale"][0]), int(tensor["zero_point"][0])
    return [(spec.quant_min - zero_point) * scale, (spec.quant_max - zero_point) * scale]


def _match(operators: list[_Operator], plan: QuantPlan) -> tuple[dict[str, _Operator], list[str]]:
    """Site -> its operator, and the operators that no site stands for."""
    anonymous = defaultdict(list)
    for name, site in plan.items():
        if site.weight is None:
            anonymous[name.rpartition(".")[0], site.op].append(name)
    found: dict[str, _Operator] = {}
    left: list[str] = []
    for operator in operators:
        if operator.name in plan:
            found[operator.name] = operator
            continue
        kind = "matmul" if operator.kind in ("matmul", "bmm") else operator.kind
        waiting = [] if operator.name else anonymous[operator.module, kind]
        if waiting:
            found[waiting.pop(0)] = operator
        else:
            left.append(str(operator))
    return found, left


def convert_ipex_summary(
    source: str | os.PathLike[str], target: str | os.PathLike[str], plan: QuantPlan
) -> list[str]:
    """Write the decisions and ranges of an IPEX summary as a summary of torch_quant.

    Sites that the file does not have stay in float. Read the result with
    ``Quantizer.load_summary(target)``. ``torch_quant.migrate.from_ipex`` does both.

    Args:
        source: a file that IPEX's ``save_qconf_summary`` wrote.
        target: the file to write.
        plan: the model's sites: ``quantizer.coverage(model, example_inputs).plan``.

    Returns:
        The operators of the file that no site stands for.

    Raises:
        InvalidConfig: ``source`` is no such file, or ``target`` cannot be written.
    """
    edited, ranges, left = read_ipex_summary(source, plan)
    write_summary(target, edited, ranges)
    return left


def read_ipex_summary(
    source: str | os.PathLike[str], plan: QuantPlan
) -> tuple[QuantPlan, dict[str, list[float]], list[str]]:
    """The decisions and ranges of an IPEX summary, for the sites of a plan.

    Args:
        source: a file that IPEX's ``save_qconf_summary`` wrote.
        plan: the model's sites.

    Returns:
        The plan with these decisions; tensor key -> the ends of its range; the operators of the
        file that no site stands for.

    Raises:
        InvalidConfig: ``source`` is no such file.
    """
    try:
        data = json.loads(Path(source).read_text(encoding="utf-8"))
        operators = list(_operators(data))
        found, left = _match(operators, plan)
        ranges: dict[str, list[float]] = {}
        sites = [_edited(site, found.get(name), ranges) for name, site in plan.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InvalidConfig(
            f"{source} is no summary of IPEX's save_qconf_summary: {type(error).__name__}: {error}"
        ) from error
    return QuantPlan(sites), ranges, left


def _edited(site: SitePlan, operator: _Operator | None, ranges: dict[str, list[float]]) -> SitePlan:
    if operator is None or len(operator.inputs) < len(site.inputs):
        return replace(site, quantized=False, reason=_ABSENT)
    pairs = list(zip(site.inputs, operator.inputs, strict=False))
    types = {str(tensor["inf_dtype"]) for _, tensor in pairs}
    spec = _SPECS.get(types.pop()) if len(types) == 1 else None
    if spec is None:
        return replace(site, quantized=False, reason="left in float by the IPEX summary")
    ranges.update({key: _range(tensor, spec) for key, tensor in pairs})
    return replace(site, activation=spec)
