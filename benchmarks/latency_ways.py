"""The ways to run a model whose latency is compared: float, this package, other tools."""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import onnxruntime_session
from latency_models import Case, Inputs
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torch_quant import Quantizer, export_onnx

__all__ = ["NEEDS", "OURS", "WAYS", "Reader", "Run", "Setting", "arrays", "first", "offered"]

Run = Callable[[Inputs], Any]
"""A call of a model that is ready; what it returns is kept only to be compared."""


class Setting:
    """One model, and what several ways to run it share.

    Args:
        case: which.
        folder: for files.
        threads: what runtimes with threads of their own are given.
    """

    def __init__(self, case: Case, folder: Path, threads: int = 1) -> None:
        self.case, self.folder, self.threads = case, folder, threads
        self.model, self.sizes = case.make(), case.sizes()
        self._quantizers: dict[str, Quantizer] = {}
        self._file: Path | None = None

    def calibrated(self, recipe: str) -> Quantizer:
        """A quantizer that has seen one call of each size."""
        if recipe not in self._quantizers:
            quantizer = Quantizer("onednn", qconfig=recipe, capture="whole")
            calib_model = quantizer.calib(self.model)
            for each in self.sizes:
                calib_model(**each)
            self._quantizers[recipe] = quantizer
        return self._quantizers[recipe]

    def file(self) -> Path:
        """The float model as ONNX, with sizes that PyTorch's exporter leaves free."""
        if self._file is None:
            self._file = self.folder / "float.onnx"
            program = torch.onnx.export(
                self.model, (), kwargs=self.sizes[0], dynamo=True, dynamic_shapes=self.free(),
                verbose=False,
            )  # fmt: skip
            program.save(self._file, external_data=False)  # type: ignore[union-attr]
        return self._file

    def free(self) -> dict[str, dict[int, Any]]:
        """The dimensions that vary from one size to the other, for exporters."""
        found = {}
        for name in self.sizes[0]:
            shapes = enumerate(zip(*(each[name].shape for each in self.sizes), strict=True))
            found[name] = {i: torch.export.Dim.AUTO for i, sizes in shapes if len(set(sizes)) > 1}
        return found


def arrays(given: Inputs) -> dict[str, Any]:
    return {name: x.numpy() for name, x in given.items()}


def first(output: Any) -> Tensor:
    """The first tensor of an output, in float32."""
    leaves = output if isinstance(output, list) else tree_leaves(output)
    return torch.as_tensor(leaves[0]).float()


def eager(setting: Setting) -> Run:
    return lambda given: setting.model(**given)


def compiled(setting: Setting) -> Run:
    from torch._inductor import config

    model = torch.compile(setting.model)
    with config.patch(freezing=True):
        for given in setting.sizes:
            model(**given)
    return lambda given: model(**given)


def bfloat16(setting: Setting) -> Run:
    model = copy.deepcopy(setting.model).bfloat16()

    def run(given: Inputs) -> Any:
        return model(**{k: x.bfloat16() if x.is_floating_point() else x for k, x in given.items()})

    return run


def ours(backend: str, recipe: str = "int8_static") -> Callable[[Setting], Run]:
    def way(setting: Setting) -> Run:
        quant_model = setting.calibrated(recipe).quantize(setting.model, backend=backend)
        return lambda given: quant_model(**given)

    return way


def bare_openvino(setting: Setting) -> Run:
    """Our file in OpenVINO, called without this package."""
    written = setting.calibrated("int8_static").quantize(setting.model, backend="openvino")
    (file,) = export_onnx(written, setting.sizes[0], setting.folder / "ours.onnx")
    return in_openvino(file, setting)


def in_openvino(model: Any, setting: Setting) -> Run:
    import openvino

    options = {"NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    options["INFERENCE_NUM_THREADS"] = setting.threads
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    return lambda given: list(request.infer(arrays(given), share_inputs=True).values())


def in_onnxruntime(file: Path, setting: Setting) -> Run:
    session = onnxruntime_session(file, setting.threads)
    return lambda given: session.run(None, arrays(given))


class Reader:
    """Calibration data as onnxruntime's quantizer wants it."""

    def __init__(self, sizes: list[Inputs]) -> None:
        self.feeds: Iterator[Inputs] = iter(sizes)

    def get_next(self) -> dict[str, Any] | None:
        given = next(self.feeds, None)
        return None if given is None else arrays(given)


def onnxruntime_static(setting: Setting) -> Run:
    from onnxruntime.quantization import QuantType, quantize_static

    found = setting.folder / "static.onnx"
    formats = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
    more = (
        {"op_types_to_quantize": ["MatMul", "Gemm"]} if setting.case.kind == "transformer" else {}
    )
    # Their calibration joins what batches gave, so all have one size.
    reader = Reader(setting.sizes[:1])
    quantize_static(_prepared(setting), found, reader, per_channel=True, **formats, **more)
    return in_onnxruntime(found, setting)


def onnxruntime_dynamic(setting: Setting) -> Run:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    found = setting.folder / "dynamic.onnx"
    quantize_dynamic(_prepared(setting), found, weight_type=QuantType.QInt8)
    return in_onnxruntime(found, setting)


def _prepared(setting: Setting) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = setting.folder / "prepared.onnx"
    if not prepared.is_file():
        quant_pre_process(setting.file(), prepared, skip_symbolic_shape=True)
    return prepared


def nncf(setting: Setting) -> Run:
    import nncf
    import openvino

    model = nncf.quantize(
        openvino.Core().read_model(setting.file()),
        nncf.Dataset([arrays(each) for each in setting.sizes]),
        model_type=nncf.ModelType.TRANSFORMER if setting.case.kind == "transformer" else None,
        subset_size=len(setting.sizes),
    )
    return in_openvino(model, setting)


def torchao(setting: Setting) -> Run:
    """PT2E, static int8, compiled by Inductor with frozen weights."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torch._inductor import config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    given = setting.sizes[0]
    program = torch.export.export(setting.model, (), given, dynamic_shapes=setting.free()).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program, quantizer)
    prepared(**given)
    model = torch.compile(convert_pt2e(prepared))
    with config.patch(freezing=True):
        for given in setting.sizes:
            model(**given)
    return lambda given: model(**given)


OURS = ("onednn", "inductor", "openvino", "onnxruntime", "ipex")
"""Backends with kernels of their own, each a column."""
WAYS: dict[str, Callable[[Setting], Run]] = {
    "float32": eager,
    "float32, compiled": compiled,
    "bfloat16": bfloat16,
    **{backend: ours(backend) for backend in OURS},
    "onednn, dynamic": ours("onednn", "int8_dynamic"),
    "our file in bare openvino": bare_openvino,
    "onnxruntime float32": lambda setting: in_onnxruntime(setting.file(), setting),
    "onnxruntime's static": onnxruntime_static,
    "onnxruntime's dynamic": onnxruntime_dynamic,
    "openvino float32": lambda setting: in_openvino(setting.file(), setting),
    "nncf in openvino": nncf,
    "torchao, inductor": torchao,
}
"""Column -> what makes a model ready; those after "onednn, dynamic" use nothing of this package but
the exported file of the first."""

NEEDS = {
    "ipex": "intel_extension_for_pytorch",
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
    "our file in bare openvino": "openvino",
    "onnxruntime float32": "onnxruntime",
    "onnxruntime's static": "onnxruntime",
    "onnxruntime's dynamic": "onnxruntime",
    "openvino float32": "openvino",
    "nncf in openvino": "nncf",
    "torchao, inductor": "torchao",
}
"""Column -> the package that it needs."""


def offered() -> dict[str, str]:
    """Column -> the package that it needs and that is not installed, empty if it can run."""
    return {
        name: package if (package := NEEDS.get(name, "")) and _missing(package) else ""
        for name in WAYS
    }


def _missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def quiet() -> None:
    """No warnings of other tools among the rows."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
