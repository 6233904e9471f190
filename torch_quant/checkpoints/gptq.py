"""The GPTQ layout, as vLLM, SGLang, gptqmodel and OpenVINO read it.

A weight ``[out, in]`` is ``qweight``, int32 ``[in * bits / 32, out]``, of codes from 0 on, packed
along the inputs; ``scales``, ``[groups, out]``; ``qzeros``, int32 ``[groups, out * bits / 32]``,
packed along the outputs, each less 1 (version 1); and ``g_idx``, the group of each input.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_quant.checkpoints.files import CheckpointFiles
from torch_quant.checkpoints.layout import FLOATS, Stored, common_refusal, group_size, wrong_entry
from torch_quant.checkpoints.packing import packed, unpacked
from torch_quant.convert.codes import QuantizedWeight
from torch_quant.core.granularity import Granularity, PerChannel, PerGroup
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.version import __version__

__all__ = ["GPTQLayout"]

_BITS = (2, 3, 4, 8)
_LESS = {"gptq": 1, "gptq_v2": 0}
"""Version of the layout -> what is taken from a zero point before it is written."""
_WHOLE = -1
"""The size of a group that is all inputs."""


class GPTQLayout:
    """See above."""

    name = "gptq"

    def refusal(self, weight: QuantizedWeight) -> str:
        if weight.plan.activation is not None:
            return f"it is written for float activations, not {weight.plan.activation}"
        if reason := common_refusal(weight, _BITS):
            return reason
        for size in weight.codes.shape:
            if size * weight.spec.bits % 32:
                return f"it fills words of 32 bits, and {size} codes of {weight.spec.bits} do not"
        if bool((weight.zero_point + _above(weight) == 0).any()):
            return "its version 1 holds no zero point of 0"
        return ""

    def config(
        self, weights: Mapping[str, QuantizedWeight], in_float: Sequence[str]
    ) -> dict[str, Any]:
        kinds = {module: _settings(weight) for module, weight in weights.items()}
        usual, _ = Counter(tuple(kind.items()) for kind in kinds.values()).most_common(1)[0]
        dynamic: dict[str, Any] = {f"-:^{re.escape(module)}$": {} for module in in_float}
        for module, kind in kinds.items():
            if tuple(kind.items()) != usual:
                dynamic[f"+:^{re.escape(module)}$"] = kind
        return {
            "quant_method": self.name,
            **dict(usual),
            "desc_act": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "lm_head": "lm_head" in weights,
            **({"dynamic": dynamic} if dynamic else {}),
            "meta": {"quantizer": [f"torch_quant:{__version__}"]},
        }

    def tensors(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        bits, inputs = weight.spec.bits, weight.codes.shape[1]
        codes, zero_point = _from_zero(weight)
        size = inputs // weight.scale.shape[1]
        return {
            "qweight": packed(codes, bits).t().contiguous(),
            "qzeros": packed(zero_point.t() - _LESS["gptq"], bits),
            "scales": weight.scale.to(dtype).t().contiguous(),
            "g_idx": torch.arange(inputs, dtype=torch.int32) // size,
        }

    def stored(self, files: CheckpointFiles, about: Mapping[str, Any]) -> dict[str, Stored]:
        version = about.get("checkpoint_format", about.get("format", "gptq"))
        if version not in _LESS:
            expected = " or ".join(map(repr, _LESS))
            raise wrong_entry(files, "checkpoint_format", version, expected)
        found = {}
        for name in files:
            module, _, ending = name.rpartition(".")
            if ending == "qweight":
                found[module] = _stored(files, module, _overridden(about, module))
        return found

    def read(self, files: CheckpointFiles, module: str, stored: Stored) -> tuple[Tensor, QParams]:
        spec, (outputs, inputs) = stored.spec, stored.shape
        about = files.config["quantization_config"]
        less = _LESS[about.get("checkpoint_format", about.get("format", "gptq"))]
        qweight = files.tensor(f"{module}.qweight")
        codes = unpacked(qweight.t().contiguous(), spec.bits, inputs)
        scale = files.tensor(f"{module}.scales").t().to(torch.float32).contiguous()
        zeros = unpacked(files.tensor(f"{module}.qzeros"), spec.bits, outputs)
        zero_point = ((zeros.t().to(torch.int32) + less) % 2**spec.bits).contiguous()
        if not spec.symmetric:
            return codes, QParams(spec, scale, zero_point)
        half = 2 ** (spec.bits - 1)
        if bool((zero_point != half).any()):
            raise InvalidConfig(
                f"{files.file(f'{module}.qzeros')}: quantization_config says that weights are "
                f"symmetric (sym), but a zero point of {module} is not {half}"
            )
        signed = (codes.to(torch.int16) - half).to(spec.dtype)
        return signed, QParams(spec, scale, torch.zeros_like(zero_point))


def _settings(weight: QuantizedWeight) -> dict[str, Any]:
    size = group_size(weight)
    return {
        "bits": weight.spec.bits,
        "group_size": _WHOLE if size is None else size,
        "sym": weight.spec.symmetric,
    }


def _above(weight: QuantizedWeight) -> int:
    """What is added to codes so that none is below 0."""
    return 2 ** (weight.spec.bits - 1) if weight.spec.signed else 0


def _from_zero(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Codes and zero points, int32, none below 0."""
    above = _above(weight)
    return weight.codes.to(torch.int32) + above, weight.zero_point + above


def _overridden(about: Mapping[str, Any], module: str) -> dict[str, Any]:
    """The settings of a module."""
    dynamic = about.get("dynamic")
    for pattern, settings in dynamic.items() if isinstance(dynamic, dict) else ():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
            return {**about, **settings}
    return dict(about)


def _stored(files: CheckpointFiles, module: str, about: Mapping[str, Any]) -> Stored:
    bits, size = about.get("bits"), about.get("group_size", _WHOLE)
    if bits not in _BITS or not isinstance(bits, int):
        raise wrong_entry(files, f"for {module} bits", bits, " or ".join(map(str, _BITS)))
    if not isinstance(size, int) or (size < 1 and size != _WHOLE):
        raise wrong_entry(files, f"for {module} group_size", size, "a size, or -1 for all inputs")
    name = f"{module}.qweight"
    words = files.shape(name)
    if len(words) != 2 or words[0] * 32 % bits:
        raise InvalidConfig(
            f"{files.file(name)}: the tensor {name} has shape {words}; expected words of 32 bits "
            f"full of codes of {bits}, and the outputs"
        )
    outputs, inputs = words[1], words[0] * 32 // bits
    granularity: Granularity = PerChannel() if size == _WHOLE else PerGroup(size)
    symmetric = about.get("sym") is not False
    spec = QuantSpec.of(bits=bits, signed=symmetric, symmetric=symmetric, granularity=granularity)
    try:
        groups = granularity.on(0).grid((outputs, inputs))[1]
    except InvalidConfig as error:
        raise InvalidConfig(f"{files.file(name)}: {name}: {error}") from error
    files.check(name, words, "I32")
    files.check(f"{module}.scales", (groups, outputs), *FLOATS)
    files.check(f"{module}.qzeros", (groups, -(-outputs * bits // 32)), "I32")
    order = f"{module}.g_idx"
    if order in files:
        files.check(order, (inputs,), "I32", "I64")
        expected = torch.arange(inputs) // (inputs // groups)
        if not torch.equal(files.tensor(order).to(torch.int64), expected):
            raise InvalidConfig(
                f"{files.file(order)}: the inputs of {module} are in groups by activation order "
                "(g_idx); such checkpoints are not read, quantize with desc_act=False"
            )
    names = {f"{module}.{ending}" for ending in ("qweight", "scales", "qzeros", "g_idx")}
    return Stored(spec, (outputs, inputs), frozenset(names & set(files)))
