"""The ways to have a network in int8 whose accuracy is compared: ours, and other tools'."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import latency_ways as latency
import torch
from accuracy_task import Inputs, Task
from torch import fx

from torch_quant import (
    FLOAT,
    GPTQ,
    AdaRound,
    AutoRound,
    QConfig,
    Quantizer,
    QuantSpec,
    RoundToNearest,
    WeightMethod,
    recipes,
)

__all__ = ["ROUNDINGS", "WAYS", "Run", "Setting"]

Run = Callable[[Inputs], Any]

RECIPES = {
    "fast": recipes.fast(),
    "int8_static": recipes.int8_static(),
    "gptq": recipes.int8_static(method="gptq"),
}


class Setting(latency.Setting):
    """One network in float, and what several ways share.

    Args:
        task: has weights and data.
        folder: for files.
        backend: ours; None for the best of this machine.
    """

    def __init__(self, task: Task, folder: Path, backend: str | None) -> None:
        self.task, self.folder, self.threads, self.backend = task, folder, 1, backend
        self.case = task  # type: ignore[assignment] # of which its kind is asked
        self.model = task.make()
        self.calibration, self.held_out = task.calibration(), task.held_out()
        self._file: Path | None = None
        self._ours: dict[str, Quantizer] = {}
        self.notes: dict[str, Any] = {}
        """What a way says of itself, beside the score."""

    @property
    def sizes(self) -> list[Inputs]:  # type: ignore[override]
        """What other tools calibrate on."""
        return self.calibration

    @sizes.setter
    def sizes(self, given: list[Inputs]) -> None:
        self.calibration = given

    def free(self) -> dict[str, dict[int, Any]]:
        found = {}
        for name in self.calibration[0]:
            every = itertools.chain(self.calibration, self.held_out)
            shapes = enumerate(zip(*(each[name].shape for each in every), strict=True))
            found[name] = {i: torch.export.Dim.AUTO for i, sizes in shapes if len(set(sizes)) > 1}
        return found

    def pairs(self) -> list[Inputs]:
        """The calibration data for graphs that PyTorch exports, which take no batch of 1: twice."""
        return [
            {k: torch.cat([x, x]) if len(x) == 1 else x for k, x in each.items()}
            for each in self.calibration
        ]

    def ours(self, recipe: str) -> Quantizer:
        """A quantizer that has seen the calibration data."""
        if recipe not in self._ours:
            quantizer = Quantizer(self.backend, qconfig=RECIPES[recipe])
            calib_model = quantizer.calib(self.model)
            with torch.no_grad():
                for each in self.calibration:
                    calib_model(**each)
            self._ours[recipe] = quantizer
        return self._ours[recipe]

    def amp(self, quantizer: Quantizer) -> Any:
        """Its proxy, after the calibration data."""
        amp_model = quantizer.amp(self.model)
        for each in self.calibration:
            amp_model(**each)
        return amp_model


def _run(setting: Setting, quantizer: Quantizer) -> Run:
    quant_model = quantizer.quantize(setting.model)
    setting.notes["int8 %"] = 100 * quantizer.coverage(setting.model).plan.coverage
    return lambda given: quant_model(**given)


def ours(recipe: str) -> Callable[[Setting], Run]:
    return lambda setting: _run(setting, setting.ours(recipe))


def three_in_float(setting: Setting) -> Run:
    quantizer = setting.ours("int8_static")
    try:
        setting.notes["in float"] = quantizer.fallback(setting.amp(quantizer), num=3)
        return _run(setting, quantizer)
    finally:
        quantizer.reset_fallback()


def optimized(recipe: str) -> Callable[[Setting], Run]:
    """Comes last of those of a recipe: what is chosen stays in the quantizer."""

    def run(setting: Setting) -> Run:
        quantizer = setting.ours(recipe)
        found = quantizer.optimize(setting.amp(quantizer))
        setting.notes["kept"] = found.kept
        return _run(setting, quantizer)

    return run


def onnxruntime_static(setting: Setting) -> Run:
    """Weights per channel; of transformers the products alone, since all else collapses."""
    from onnxruntime.quantization import QuantType, quantize_static

    found = setting.folder / "static.onnx"
    formats = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
    few = {"op_types_to_quantize": ["MatMul", "Gemm"]} if setting.task.kind == "transformer" else {}
    reader = latency.Reader(setting.calibration)
    quantize_static(latency._prepared(setting), found, reader, per_channel=True, **formats, **few)
    return latency.in_onnxruntime(found, setting)


def torchao(setting: Setting) -> Run:
    """PT2E for x86, computed by its own reference graph."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    given, free = setting.held_out[0], setting.free()
    exported = torch.export.export(setting.model, (), given, dynamic_shapes=free).module()
    prepared = prepare_pt2e(exported, quantizer)
    for each in setting.pairs():
        prepared(**each)
    model = convert_pt2e(prepared)
    setting.notes["quantized"] = _products(model)
    return lambda given: model(**given)


def _products(gm: fx.GraphModule) -> str:
    """How many of the products of a PT2E graph read quantized inputs."""
    names = ("conv", "linear", "addmm", "matmul", "bmm", "mm.", "lstm", "scaled_dot_product")
    found = [node for node in gm.graph.nodes if node.op == "call_function" and any(
        f"aten.{name}" in str(node.target) for name in names)]  # fmt: skip
    few = [n for n in found if any("dequantize" in str(x.target) for x in n.all_input_nodes[:1])]
    return f"{len(few)} of {len(found)}"


def neural_compressor(setting: Setting) -> Run:
    """INC's static int8 for this processor: PT2E with its own export and configuration."""
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import INT8StaticQuantConfig, convert, prepare

    given = tuple(setting.held_out[0].values())
    exported = export(setting.model, given, tuple(setting.free().values()))
    prepared = prepare(exported, INT8StaticQuantConfig())
    for each in setting.pairs():
        prepared(*each.values())
    model = convert(prepared)
    setting.notes["quantized"] = _products(model)
    return lambda given: model(*given.values())


WAYS: dict[str, Callable[[Setting], Run]] = {
    "float32": lambda setting: lambda given: setting.model(**given),
    "fast()": ours("fast"),
    "default": ours("int8_static"),
    "3 layers in float": three_in_float,
    "optimize": optimized("int8_static"),
    "GPTQ, optimize": optimized("gptq"),
    "torchao PT2E": torchao,
    "onnxruntime": onnxruntime_static,
    "NNCF": lambda setting: latency.nncf(setting),
    "INC": neural_compressor,
}
"""Column -> what makes a network ready, in the order in which they run: NNCF changes torch."""


def rounded(bits: int, method: WeightMethod) -> Callable[[Setting], Run]:
    """Our default with weights of so many bits, a scale for each output channel."""
    weight = QuantSpec.of(bits=bits, signed=True, symmetric=True, per_channel=True)
    config = replace(recipes.int8_static(method=method), weight=weight)
    return lambda setting: _rounded(setting, config)


def _rounded(setting: Setting, config: QConfig) -> Run:
    """Float arithmetic of the reference, so that all layers have the bits that are asked for."""
    quantizer = Quantizer("reference", qconfig=config)
    calib_model, start = quantizer.calib(setting.model), time.process_time()
    with torch.no_grad():
        for each in setting.calibration:
            calib_model(**each)
    if config.method is not None and config.method.wants_blocks:
        quantizer.round_weights(setting.model, setting.calibration)
    run = _run(setting, quantizer)
    setting.notes["CPU seconds to quantize"] = round(time.process_time() - start, 1)
    return run


METHODS: dict[str, WeightMethod] = {
    "to nearest": RoundToNearest(),
    "GPTQ": GPTQ(),
    "AutoRound": AutoRound(),
    "AdaRound": AdaRound(),
}
ROUNDINGS: dict[str, Callable[[Setting], Run]] = {
    "float32": WAYS["float32"],
    "float weights, int8 activations": lambda setting: _rounded(setting, QConfig(weight=FLOAT)),
    **{f"int8 {name}": rounded(8, method) for name, method in METHODS.items()},
    **{f"int4 {name}": rounded(4, method) for name, method in METHODS.items()},
}
"""The same for ways to round weights under int8 activations: ``--roundings``."""
