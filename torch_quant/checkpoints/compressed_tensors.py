"""compressed-tensors, as vLLM, transformers and OpenVINO read it: ``pack-quantized`` integers.

A weight ``[out, in]`` is ``weight_packed``, int32 ``[out, in * bits / 32]``, of codes with half
their range added so that none is negative, ``weight_scale``, ``[out, in / group]``, and
``weight_shape``. With dynamic activations of 8 bits per token it is ``int-quantized``: int8 under
the weight's own name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_quant.checkpoints.files import CheckpointFiles
from torch_quant.checkpoints.layout import FLOATS, Stored, common_refusal, group_size, wrong_entry
from torch_quant.checkpoints.packing import packed, unpacked
from torch_quant.convert.codes import QuantizedWeight
from torch_quant.core.granularity import Granularity, PerChannel, PerGroup, PerToken
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig

__all__ = ["COMPRESSED_TENSORS", "OWN", "PackedLayout"]

_PACKED, _PLAIN = "pack-quantized", "int-quantized"


@dataclass(frozen=True)
class PackedLayout:
    """See above.

    Args:
        name: what ``quant_method`` says.
        bits: of the weights that it holds.
        affine: whether weights with zero points are written, too; they are always read.
    """

    name: str
    bits: tuple[int, ...]
    affine: bool

    def refusal(self, weight: QuantizedWeight) -> str:
        activation, spec = weight.plan.activation, weight.spec
        if activation is not None and not (_is_token(activation) and _is_int8(weight)):
            return (
                "it is written for float activations, or for dynamic ones of 8 bits per token with "
                f"signed int8 weights per output channel, not {activation} with {spec}"
            )
        if reason := common_refusal(weight, self.bits):
            return reason
        if not self.affine and not _is_symmetric(weight):
            return f"it is written for signed codes with zero at 0, not {weight.spec}"
        return ""

    def config(
        self, weights: Mapping[str, QuantizedWeight], in_float: Sequence[str]
    ) -> dict[str, Any]:
        kinds: dict[tuple[int, int | None, bool, QuantSpec | None], list[str]] = {}
        for module, weight in weights.items():
            about = (weight.spec.bits, group_size(weight), _is_symmetric(weight))
            kinds.setdefault((*about, weight.plan.activation), []).append(module)
        groups = {}
        for i, ((bits, size, symmetric, activation), modules) in enumerate(kinds.items()):
            groups[f"group_{i}"] = {
                "targets": ["Linear"] if len(kinds) == 1 else modules,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": "channel" if size is None else "group",
                    "group_size": size,
                    "dynamic": False,
                },
                "input_activations": None if activation is None else _tokens(activation),
                "output_activations": None,
                "format": _PACKED if activation is None else _PLAIN,
            }
        formats = {str(each["format"]) for each in groups.values()}
        return {
            "quant_method": self.name,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(in_float),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def tensors(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        bits = weight.spec.bits
        if weight.plan.activation is not None:
            scale = weight.scale.to(dtype)
            return {"weight": weight.codes.to(torch.int8).contiguous(), "weight_scale": scale}
        above = 2 ** (bits - 1) if weight.spec.signed else 0
        found = {
            "weight_packed": packed(weight.codes.to(torch.int32) + above, bits),
            "weight_scale": weight.scale.to(dtype),
            "weight_shape": torch.tensor(weight.codes.shape),
        }
        if not _is_symmetric(weight):
            zero_point = packed((weight.zero_point + above).t(), bits).t()
            found["weight_zero_point"] = zero_point.contiguous()
        return found

    def stored(self, files: CheckpointFiles, about: Mapping[str, Any]) -> dict[str, Stored]:
        groups = about.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise wrong_entry(files, "config_groups", groups, "schemes by name")
        for name in ("kv_cache_scheme", "transform_config"):
            if about.get(name):
                raise wrong_entry(files, name, about[name], "none")
        found = {}
        for name in files:
            module, _, ending = name.rpartition(".")
            whole = ending == "weight" and f"{module}.weight_scale" in files
            if ending == "weight_packed" or whole:
                scheme = _scheme(files, groups, module)
                found[module] = _stored(files, module, name, scheme, self.bits)
        return found

    def read(self, files: CheckpointFiles, module: str, stored: Stored) -> tuple[Tensor, QParams]:
        spec, (_, inputs) = stored.spec, stored.shape
        grid = spec.granularity.on(0).grid(stored.shape)
        scale = files.tensor(f"{module}.weight_scale").to(torch.float32)
        if scale.shape != grid:  # one of all, or of a channel
            scale = scale.reshape(-1, 1).expand(grid).contiguous()
        half = 2 ** (spec.bits - 1)
        if f"{module}.weight_packed" in stored.tensors:
            codes = unpacked(files.tensor(f"{module}.weight_packed"), spec.bits, inputs)
        else:
            codes = (files.tensor(f"{module}.weight").to(torch.int16) + half).to(torch.uint8)
        if spec.symmetric:
            signed = (codes.to(torch.int16) - half).to(spec.dtype)
            return signed, QParams(spec, scale, torch.zeros(grid, dtype=torch.int32))
        zero_point = files.tensor(f"{module}.weight_zero_point")
        if zero_point.dtype == torch.int32:  # packed along the channels, of which it was a column
            zero_point = unpacked(zero_point.t().contiguous(), spec.bits, grid[0]).t()
        else:
            zero_point = zero_point.to(torch.int32) + half
        return codes, QParams(spec, scale, zero_point.to(torch.int32).contiguous())


COMPRESSED_TENSORS = PackedLayout("compressed-tensors", (2, 4, 8), affine=False)
"""Other widths are packed in two ways, by versions of the library before and since 0.20."""
OWN = PackedLayout("torch_quant", tuple(range(1, 9)), affine=True)
"""The same for whoever has this package: all that its formats have."""


def _is_token(spec: QuantSpec) -> bool:
    """Whether activations are int8, or uint8 with a zero point, with a scale for each token."""
    eight = spec.full_range and spec.bits == 8 and spec.signed == spec.symmetric
    return eight and spec.dynamic and isinstance(spec.granularity, PerToken)


def _is_int8(weight: QuantizedWeight) -> bool:
    return weight.spec.bits == 8 and weight.spec.per_channel and _is_symmetric(weight)


def _tokens(spec: QuantSpec) -> dict[str, Any]:
    return {
        "num_bits": 8, "type": "int", "symmetric": spec.symmetric, "strategy": "token",
        "dynamic": True, "group_size": None,
    }  # fmt: skip


def _activation(files: CheckpointFiles, module: str, about: Any) -> QuantSpec | None:
    """The format of a layer's input that a scheme asks for."""
    if about is None:
        return None
    wanted = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    if not isinstance(about, dict) or any(about.get(k) != v for k, v in wanted.items()):
        expected = "none, or dynamic ones of 8 bits per token"
        raise wrong_entry(files, f"for {module} the input_activations", about, expected)
    element = "uint8" if about.get("symmetric") is False else "int8"
    return QuantSpec.of(element, granularity=PerToken(), dynamic=True)


def _is_symmetric(weight: QuantizedWeight) -> bool:
    return weight.spec.signed and weight.spec.symmetric and not bool(weight.zero_point.any())


def _scheme(files: CheckpointFiles, groups: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The scheme of a module: one that targets its name goes before one for all linear layers."""
    by_class = None
    for scheme in groups.values():
        if not isinstance(scheme, dict) or not isinstance(scheme.get("targets"), list):
            raise wrong_entry(files, "config_groups", groups, "schemes with targets and weights")
        for target in map(str, scheme["targets"]):
            pattern = target.removeprefix("re:")
            if target == module or (pattern != target and re.match(pattern, module)):
                return scheme
            by_class = by_class or (scheme if target == "Linear" else None)
    if by_class is None:
        raise wrong_entry(files, "config_groups", groups, f"one that targets {module}")
    return by_class


def _stored(
    files: CheckpointFiles,
    module: str,
    name: str,
    scheme: Mapping[str, Any],
    allowed: tuple[int, ...],
) -> Stored:
    weights = scheme.get("weights")
    if not isinstance(weights, dict):
        raise wrong_entry(files, f"for {module} the weights", weights, "what they are quantized to")
    activation = _activation(files, module, scheme.get("input_activations"))
    if scheme.get("output_activations") is not None:
        raise wrong_entry(files, f"for {module} quantized results", scheme, "float ones")
    about = scheme.get("format")
    if about not in (None, _PACKED, _PLAIN):
        raise wrong_entry(files, f"for {module} the format", about, f"{_PACKED} or {_PLAIN}")
    spec = _spec(files, module, weights, allowed)
    if f"{module}.weight_g_idx" in files:
        raise InvalidConfig(
            f"{files.file(f'{module}.weight_g_idx')}: the inputs of {module} are in groups by "
            "activation order; such checkpoints are not read, quantize without actorder"
        )
    whole = name.endswith(".weight")
    if whole:
        shape = files.shape(name)
    else:
        files.check(f"{module}.weight_shape", (2,), "I64", "I32")
        shape = tuple(files.tensor(f"{module}.weight_shape").tolist())
    if len(shape) != 2:
        raise InvalidConfig(f"{files.file(name)}: {name} is of shape {shape}; expected two sizes")
    outputs, inputs = shape
    try:
        grid = spec.granularity.on(0).grid(shape)
    except InvalidConfig as error:
        raise InvalidConfig(f"{files.file(name)}: {name}: {error}") from error
    if whole:
        files.check(name, shape, "I8")
    else:
        files.check(name, (outputs, _words(inputs, spec.bits)), "I32")
    scale = f"{module}.weight_scale"
    flat = files.shape(scale) in ((outputs,), (1,)) and grid == (outputs, 1)
    files.check(scale, files.shape(scale) if flat else grid, *FLOATS)
    names = {name, scale, f"{module}.weight_shape"}
    if not spec.symmetric:
        names.add(f"{module}.weight_zero_point")
        packed_rows = (_words(outputs, spec.bits), grid[1])
        dtype = "I8" if whole else "I32"
        files.check(f"{module}.weight_zero_point", grid if whole else packed_rows, dtype)
    return Stored(spec, (outputs, inputs), frozenset(names & set(files)), activation)


def _words(codes: int, bits: int) -> int:
    return -(-codes * bits // 32)


def _spec(
    files: CheckpointFiles, module: str, weights: Mapping[str, Any], allowed: tuple[int, ...]
) -> QuantSpec:
    bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
    if kind != "int" or bits not in allowed:
        expected = f"integers of {', '.join(map(str, allowed))} bits"
        raise wrong_entry(files, f"for {module}", f"{bits} bits of type {kind}", expected)
    size = weights.get("group_size")
    granularity: Granularity
    if strategy == "group" and isinstance(size, int) and size > 0:
        granularity = PerGroup(size)
    elif strategy in ("channel", "tensor"):
        granularity = PerChannel()
    else:
        raise wrong_entry(files, f"for {module} the strategy", strategy, "group or channel")
    symmetric = weights.get("symmetric") is not False
    return QuantSpec.of(bits=bits, signed=symmetric, symmetric=symmetric, granularity=granularity)
