"""Whether TorchScript is as torch_blade takes it.

The facts are those of BladeDISC's CPU pattern, ``dequantize -> linear -> quantize``, into which it
turns ``aten::fake_quantize_per_tensor_affine`` and ``..._per_channel_affine`` with constant
parameters; a format is signed and symmetric to it where codes go below 0.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_quant.core.plan import QuantPlan
from torch_quant.errors import InvalidConfig

__all__ = ["DiscReport", "verify"]

_LINEAR = "aten::linear"
_PER_TENSOR = "aten::fake_quantize_per_tensor_affine"
_PER_CHANNEL = "aten::fake_quantize_per_channel_affine"
_SIGNATURES = {
    _PER_TENSOR: "Tensor, float scale, int zero_point, int quant_min, int quant_max",
    _PER_CHANNEL: "Tensor, Tensor scale, Tensor zero_point, int axis, int quant_min, int quant_max",
}
_LIMITS = (-128, 127)
_AGAIN = "export_torchscript(quantizer.quantize(model, backend='disc'), example, path) writes it so"
_MOST = 8
"""Violations that a message lists."""


@dataclass(frozen=True)
class DiscReport:
    """What torch_blade finds in a file that meets its requirements; ``print`` shows it.

    Args:
        quantized: the linear layers between fake-quantizers.
        in_float: the other linear layers.
        left_out: nothing, as what is planned in int8 and is not there is an error here; other
            backends' reports have such sites in it.
    """

    quantized: tuple[str, ...] = ()
    in_float: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all that is planned in int8 runs in int8: an error is raised otherwise."""
        return not self.left_out

    def __str__(self) -> str:
        total = len(self.quantized) + len(self.in_float)
        lines = [f"{len(self.quantized)} of {total} linear layers are as torch_blade takes them"]
        if self.in_float:
            lines.append(f"in float: {', '.join(self.in_float)}")
        return "\n".join(lines)


def verify(
    subject: nn.Module | str | os.PathLike[str], machine: str, plan: QuantPlan | None
) -> DiscReport:
    """Check every requirement; see ``DiscBackend.verify``.

    Args:
        subject: TorchScript or its file.
        machine: ``"x86"`` or ``"aarch64"``.
        plan: what should be in int8; None for whatever is.
    """
    script = _scripted(subject)
    checking = _Checking(script, machine)
    checking.module()
    checking.graph(script.inlined_graph)
    if plan is not None:
        checking.planned(plan)
    if checking.violations:
        shown = [f"- {each}" for each in checking.violations[:_MOST]]
        rest = len(checking.violations) - _MOST
        shown += [f"- and {rest} more"] if rest > 0 else []
        listed = "\n".join(shown)
        raise InvalidConfig(f"torch_blade does not take this TorchScript as int8:\n{listed}")
    return DiscReport(tuple(checking.quantized), tuple(checking.in_float))


def _scripted(subject: Any) -> nn.Module:
    if isinstance(subject, (str, os.PathLike)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.jit's deprecation
                loaded: nn.Module = torch.jit.load(os.fspath(subject))
        except (RuntimeError, ValueError, OSError) as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise InvalidConfig(f"cannot read the TorchScript file {subject}: {first}") from error
        return loaded
    if not isinstance(subject, torch.jit.ScriptModule):
        raise InvalidConfig(
            f"expected traced TorchScript or its file, got {type(subject).__name__}: {_AGAIN}"
        )
    return subject


class _Checking:
    """Walks one module and notes what torch_blade would not take.

    Args:
        script: the module.
        machine: ``"x86"`` or ``"aarch64"``.
    """

    def __init__(self, script: nn.Module, machine: str) -> None:
        self.script, self.machine = script, machine
        self.violations: list[str] = []
        self.quantized: list[str] = []
        self.in_float: list[str] = []

    def _wrong(self, name: str, expected: str, got: str, fix: str) -> None:
        text = f"{name}: expected {expected}; got {got}: {fix}"
        if text not in self.violations:
            self.violations.append(text)

    def module(self) -> None:
        """It is in eval mode."""
        modules = self.script.named_modules()
        training = [name or "(root)" for name, each in modules if getattr(each, "training", False)]
        if training:
            self._wrong(training[0], "eval mode", "training mode", "trace model.eval()")

    def graph(self, graph: Any) -> None:
        """Every linear layer and every fake-quantizer stands as it should."""
        belonging: set[Any] = set()
        nodes = list(_nodes(graph))
        for node in nodes:
            if node.kind() == _LINEAR:
                self._linear(node, belonging)
        for node in nodes:
            self._other(node, belonging)

    def planned(self, plan: QuantPlan) -> None:
        """What is planned in int8 is there.

        Layers are told by the names of their weights, call by call. A tied weight has one name, and
        a functional product's is no site: such layers and sites are compared by their number.
        """
        there, in_float = Counter(self.quantized), Counter(self.in_float)
        floats = Counter(_call_of(name) for name, site in plan.items() if not site.quantized)
        missing, untold = [], []
        for name in plan.quantized:
            layer = _call_of(name)
            if there[layer]:
                there[layer] -= 1
            elif in_float[layer] > floats[layer]:
                missing.append(name)
            else:
                untold.append(name)
        wholly = {_call_of(name) for name in plan} - {_call_of(name) for name in plan.quantized}
        named_otherwise = sum(
            count for layer, count in there.items() if layer not in wholly or in_float[layer]
        )
        for name in missing:
            self._wrong(name, "a linear layer between fake-quantizers", "one in float", _AGAIN)
        if len(untold) > named_otherwise:
            for name in untold:
                self._wrong(name, "a linear layer between fake-quantizers", "none", _AGAIN)

    def _other(self, node: Any, belonging: set[Any]) -> None:
        kind = node.kind()
        namespace = kind.partition("::")[0]
        if namespace not in ("aten", "prim"):
            self._wrong(_name(node), "operators of PyTorch alone", kind, _AGAIN)
        elif kind in ("aten::quantize_per_tensor", "aten::quantize_per_channel"):
            self._wrong(_name(node), "aten::fake_quantize_*", kind, _AGAIN)
        elif kind.startswith("aten::fake_quantize"):
            if kind not in _SIGNATURES:
                self._wrong(_name(node), " or ".join(_SIGNATURES), kind, _AGAIN)
            elif node not in belonging:
                self._wrong(
                    _name(node),
                    "a fake-quantizer directly at the input, weight or result of aten::linear",
                    "one elsewhere, which would be computed in float",
                    _AGAIN,
                )

    def _linear(self, node: Any, belonging: set[Any]) -> None:
        given, weight, *_ = list(node.inputs())
        name = _layer(node, weight)
        users = [use.user for use in node.output().uses()]
        ends = {
            "input": given.node(),
            "weight": weight.node(),
            "result": users[0] if len(users) == 1 else None,
        }
        found = {each: node is not None and _is_fake(node) for each, node in ends.items()}
        own = found["input"] and not _is_result(ends["input"])
        if not own and not found["weight"]:  # between layers that are in int8, it may be
            self._not_frozen(name, weight)
            self.in_float.append(name)
            return
        before = len(self.violations)
        for which, is_there in found.items():
            if is_there:
                continue
            if which == "weight" and ends[which].kind() == "prim::Constant":
                self._not_frozen(name, weight)
                continue
            got = "none" if ends[which] is None else ends[which].kind()
            if which == "result" and len(users) != 1:
                got = f"{len(users)} readers: {', '.join(sorted({u.kind() for u in users}))}"
            self._wrong(
                f"{name}, its {which}",
                "a fake-quantizer directly there, which alone reads it"
                if which == "result"
                else "a fake-quantizer directly there",
                got,
                _AGAIN,
            )
        belonging |= {ends[which] for which, is_there in found.items() if is_there}
        belonging |= {user for user in users if _is_fake(user)}
        for which in ("input", "result"):
            if found[which]:
                self._per_tensor(f"{name}, its {which}", ends[which])
        if found["weight"]:
            self._weight(name, ends["weight"])
        if len(self.violations) == before:
            self.quantized.append(name)

    def _not_frozen(self, name: str, weight: Any) -> None:
        """A frozen graph has a constant for a weight, and no quantizer."""
        if weight.node().kind() == "prim::Constant":
            self._wrong(
                f"{name}, its weight",
                "a parameter or buffer",
                "a constant: the module was frozen, which rounds weights for good",
                "save what torch.jit.trace returns, without torch.jit.freeze",
            )

    def _weight(self, name: str, node: Any) -> None:
        wanted = _PER_CHANNEL if self.machine == "x86" else _PER_TENSOR
        where = f"{name}, its weight"
        if node.kind() != wanted:
            fix = f"quantize for DiscBackend(machine={self.machine!r})"
            self._wrong(where, f"{wanted} on {self.machine}", node.kind(), fix)
            return
        held = next(iter(node.inputs()))
        value = self._tensor(held)
        self._not_frozen(name, held)
        if value is not None and value.dtype != torch.float32:
            self._wrong(where, "a float32 tensor", str(value.dtype), _AGAIN)
        if wanted == _PER_TENSOR:
            self._per_tensor(where, node)
        else:
            self._per_channel(where, node, value)

    def _per_tensor(self, where: str, node: Any) -> None:
        if node.kind() != _PER_TENSOR:
            self._wrong(where, _PER_TENSOR, node.kind(), _AGAIN)
            return
        scale, zero_point, *limits = (_constant(each) for each in list(node.inputs())[1:])
        self._number(where, "scale", scale, float)
        self._number(where, "zero_point", zero_point, int)
        if isinstance(scale, float) and not scale > 0:
            self._wrong(where, "a scale above 0", f"{scale}", "calibrate again")
        if isinstance(zero_point, int) and zero_point != 0:
            self._wrong(
                where, "zero point 0, as signed codes are symmetric", f"{zero_point}", _AGAIN
            )
        self._limits(where, limits)

    def _per_channel(self, where: str, node: Any, weight: Tensor | None) -> None:
        _, scale, zero_point, axis, *limits = list(node.inputs())
        scales, zeros = self._tensor(scale), self._tensor(zero_point)
        for what, value in (("scale", scales), ("zero_point", zeros)):
            if value is None:
                kind = (scale if what == "scale" else zero_point).node().kind()
                self._wrong(where, f"a constant {what}", kind, _AGAIN)
        if zeros is not None and zeros.dtype != torch.int32:
            self._wrong(where, "zero points in int32", str(zeros.dtype), _AGAIN)
        if zeros is not None and bool(zeros.any()):
            self._wrong(where, "zero points 0, as signed codes are symmetric", "others", _AGAIN)
        if scales is not None and scales.dtype != torch.float32:
            self._wrong(where, "scales in float32", str(scales.dtype), _AGAIN)
        if scales is not None and weight is not None and list(scales.shape) != [weight.shape[0]]:
            sizes = f"scales of shape {list(scales.shape)} for a weight of {list(weight.shape)}"
            self._wrong(where, "a scale for each output channel", sizes, _AGAIN)
        if _constant(axis) != 0:
            self._wrong(where, "axis 0", f"axis {_constant(axis)}", _AGAIN)
        self._limits(where, [_constant(each) for each in limits])

    def _number(self, where: str, what: str, value: Any, kind: type) -> None:
        if type(value) is not kind:
            got = "a tensor or a computed value" if value is None else repr(value)
            self._wrong(where, f"{what} as a constant {kind.__name__}", got, _AGAIN)

    def _limits(self, where: str, limits: list[Any]) -> None:
        if tuple(limits) != _LIMITS:
            got = f"codes from {limits[0]} to {limits[1]}"
            self._wrong(where, f"codes from {_LIMITS[0]} to {_LIMITS[1]}", got, _AGAIN)

    def _tensor(self, value: Any) -> Tensor | None:
        """A tensor of the module, by the attributes that lead to it, or a constant."""
        node = value.node()
        if node.kind() == "prim::Constant":
            found = _constant(value)
            return found if isinstance(found, Tensor) else None
        path = _path(node)
        held: Any = self.script
        for part in path.split(".") if path else ():
            held = getattr(held, part, None)
        return held if isinstance(held, Tensor) else None


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _is_fake(node: Any) -> bool:
    return str(node.kind()).startswith("aten::fake_quantize")


def _is_result(fake: Any) -> bool:
    """Whether a fake-quantizer stands at the result of a linear layer."""
    return bool(next(iter(fake.inputs())).node().kind() == _LINEAR)


def _constant(value: Any) -> Any:
    """The value of a constant, None for what is none."""
    return value.toIValue() if value.node().kind() == "prim::Constant" else None


def _path(node: Any) -> str:
    """``encoder.fc.weight`` of an attribute of the module, empty for other nodes."""
    parts: list[str] = []
    while node.kind() == "prim::GetAttr":
        parts.append(node.s("name"))
        (holder,) = list(node.inputs())
        node = holder.node()
    return ".".join(reversed(parts))


def _layer(node: Any, weight: Any) -> str:
    """The layer whose weight is read, else the name of the node's result."""
    holder = weight.node()
    if _is_fake(holder):
        holder = next(iter(holder.inputs())).node()
    path = _path(holder)
    if not path:
        return _name(node)
    return re.sub(r"(^|\.)weight(_\d+)?$", "", path) or "(root)"


def _call_of(site: str) -> str:
    """The layer of which a site is a call."""
    return site.partition("@")[0]


def _name(node: Any) -> str:
    outputs = [each.debugName() for each in node.outputs()]
    return f"{node.kind()} %{outputs[0]}" if outputs else str(node.kind())
