"""``torch-quant export``: the quantized model in a format that other programs read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torch_quant_cli.artifact import Artifact, check_above
from torch_quant_cli.exits import FAILED, Failed
from torch_quant_cli.options import data_options, inputs_for, model_options, reading_of
from torch_quant_cli.running import Result, command, needed

if TYPE_CHECKING:
    from torch import nn

__all__ = ["cli"]

logger = logging.getLogger("torch_quant")


@click.command(
    "export",
    short_help="Write it for onnxruntime, OpenVINO, vLLM, C++ ...",
)
@click.argument("folder")
@click.option(
    "--to",
    "form",
    required=True,
    type=click.Choice(
        ["onnx", "openvino", "inductor", "pt2", "torchscript", "compressed-tensors", "gptq"]
    ),
    help="The format.",
)
@click.option("--out", required=True, help="The file, or for checkpoints the folder, to write.")
@click.option("--overwrite", is_flag=True, help="Replace a file at --out.")
@data_options(8)
@model_options
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of what stays in float in a checkpoint.",
)
@command
def cli(
    folder: str, form: str, out: str, overwrite: bool, data: str | None, model: str | None,
    factory: str | None, dtype: str, **options: Any,
) -> Result:  # fmt: skip
    """Write FOLDER's model for another program.

    onnx (.onnx), openvino (.xml) and inductor (.pt2, compiled, for C++ too) need the float model
    again, since they lower it anew with the calibration of FOLDER. pt2 and torchscript hold this
    package's operators: import torch_quant before loading. compressed-tensors and gptq are Hugging
    Face folders for weight-only models (vLLM, transformers).

    \b
    Examples:
      torch-quant export my-bert-int8 --to onnx --out my-bert.onnx
      torch-quant export my-bert-int8 --to torchscript --out my-bert.pt
      torch-quant export my-llm-int8 --to compressed-tensors --out my-llm-ct
    """
    how = reading_of(options)
    target = _target(out, overwrite, form)
    artifact = Artifact(folder, model, factory)
    floating = artifact.float_model() if form in _LOWERED_ANEW or data is not None else None
    inputs = None
    if form not in _CHECKPOINTS:
        inputs = inputs_for(artifact, floating or artifact.quant_model(), data, how)[0]
    write = _FORMS[form]
    files = write(artifact, floating, inputs, target, dtype)
    size = sum(_size(each) for each in files)
    names = ", ".join(map(str, files))
    return Result(
        f"wrote {names} ({size / 1e6:.1f} MB)\n{_NEXT[form].format(out=out)}",
        {"files": [str(each) for each in files], "bytes": size, "format": form},
    )


def _size(path: Path) -> int:
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files)


def _target(out: str, overwrite: bool, form: str) -> Path:
    path = Path(out)
    if path.is_dir() and (form not in _CHECKPOINTS or any(path.iterdir())):
        kind = "a new folder" if form in _CHECKPOINTS else f"a file, as {path / 'model'}..."
        raise Failed(f"--out {out} is a folder that exists: give {kind}")
    both = [path, path.with_suffix(".bin")] if form == "openvino" else [path]
    if held := [each for each in both if each.is_file() and not overwrite]:
        raise Failed(f"--out: {held[0]} exists: give another name, or --overwrite to replace it")
    check_above(out)
    ending = _ENDINGS.get(form)
    if ending is not None and path.suffix != ending:
        raise Failed(f"--out {out}: a file of {form} ends in {ending}")
    return path


def _onnx(
    artifact: Artifact, floating: nn.Module | None, inputs: Any, target: Path, dtype: str
) -> list[Path]:
    needed("onnx", "onnxscript", what="--to onnx")
    from torch_quant import Backend, export_onnx

    assert floating is not None
    quantizer = artifact.quantizer()
    if quantizer.state.rounded and artifact.hugging_face is not None:
        quant_model = _by_checkpoint(artifact, inputs)
    else:
        quantizer.backend = Backend.get("onnx")  # so that the model is captured as one graph
        quant_model = quantizer.quantize(floating, example_inputs=inputs)
    return export_onnx(quant_model, inputs, target)


def _inductor(
    artifact: Artifact, floating: nn.Module | None, inputs: Any, target: Path, dtype: str
) -> list[Path]:
    from torch_quant import Backend, export_inductor
    from torch_quant.backends import ReferenceBackend

    assert floating is not None
    quantizer = artifact.quantizer()
    if missing := Backend.get("inductor").unavailable():
        raise Failed(f"--to inductor: {missing}")
    quantizer.backend = Backend.get("inductor")
    # Captured with a backend that compiles nothing, so that what is compiled is the file alone.
    quantizer.quantize(floating, backend=ReferenceBackend(quantizer.backend), example_inputs=inputs)
    export_inductor(quantizer.quantize(floating), inputs, target)
    return [target]


def _by_checkpoint(artifact: Artifact, inputs: Any) -> nn.Module:
    """The model for ONNX with the very codes that were rounded block by block."""
    import tempfile

    from torch_quant import export_checkpoint, load_checkpoint

    with tempfile.TemporaryDirectory() as parent:
        folder = export_checkpoint(artifact.quant_model(), Path(parent) / "codes")
        return load_checkpoint(folder, backend="onnx", example_inputs=inputs)


def _openvino(
    artifact: Artifact, floating: nn.Module | None, inputs: Any, target: Path, dtype: str
) -> list[Path]:
    needed("openvino", "onnx", "onnxscript", what="--to openvino")
    import os

    import openvino

    from torch_quant.io.files import staging

    with staging(target) as stage:
        (file,) = _onnx(artifact, floating, inputs, stage / "model.onnx", dtype)
        made = openvino.convert_model(str(file))
        openvino.save_model(made, str(stage / target.name), compress_to_fp16=False)
        weights = target.with_suffix(".bin")
        os.replace((stage / target.name).with_suffix(".bin"), weights)
        os.replace(stage / target.name, target)
    return [target, weights]


def _pt2(
    artifact: Artifact, floating: nn.Module | None, inputs: Any, target: Path, dtype: str
) -> list[Path]:
    import torch

    from torch_quant.graph.examples import example_call
    from torch_quant.io.files import write_atomically, write_stream

    args, kwargs = example_call(inputs)
    free = torch.utils._pytree.tree_map(_free_sizes, (args, kwargs))
    dynamic = {**dict(enumerate(free[0])), **free[1]} if kwargs and args else free[1] or free[0]
    try:
        with torch.no_grad():
            program = torch.export.export(
                artifact.quant_model(), args, kwargs, dynamic_shapes=dynamic
            )
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:300]
        raise Failed(f"torch.export cannot export the model: {first}", FAILED) from error
    fixed = [
        f"{node.name} of {list(node.meta['val'].shape)}"
        for node in program.graph.find_nodes(op="placeholder")
        if node.name in program.graph_signature.user_inputs
        and any(isinstance(size, int) for size in getattr(node.meta.get("val"), "shape", ()))
    ]
    if fixed:
        logger.warning(
            "the file serves %s: numbers are sizes that it takes alone. --data with --batch-size 2 "
            "or more leaves the batch free",
            ", ".join(fixed),
        )
    save = partial(torch.export.save, program)
    write_atomically(target, lambda name: write_stream(Path(name), save))
    return [target]


def _free_sizes(x: Any) -> Any:
    """Every size as free as the model allows."""
    import torch

    if not isinstance(x, torch.Tensor):
        return None
    return dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO)


def _torchscript(
    artifact: Artifact, floating: nn.Module | None, inputs: Any, target: Path, dtype: str
) -> list[Path]:
    from torch_quant import export_torchscript

    export_torchscript(artifact.quant_model(), inputs, target)
    return [target]


def _checkpoint(
    artifact: Artifact, floating: nn.Module | None, inputs: Any, target: Path, dtype: str, *,
    layout: str,
) -> list[Path]:  # fmt: skip
    import torch

    from torch_quant import InvalidConfig, export_checkpoint
    from torch_quant_cli.texts import TOKENIZER_FILES, tokenizer_of

    folder = artifact.hugging_face
    if folder is None:
        raise Failed(
            f"--to {layout} writes a Hugging Face folder, and {artifact.folder} was made of "
            f"{artifact.source.shown}: --to pt2 or torchscript write any model"
        )
    held = any((folder / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = tokenizer_of(folder, "the checkpoint") if held else None
    kind = getattr(torch, dtype)
    try:
        made = export_checkpoint(
            artifact.quant_model(), target, layout, dtype=kind, tokenizer=tokenizer
        )
    except InvalidConfig as error:
        raise Failed(
            f"{error}\nCheckpoints hold what --recipe int8_weight_only and int4_weight_only give, "
            "and compressed-tensors int8_dynamic too: quantize with one of these"
        ) from error
    return [made]


_FORMS: dict[str, Callable[..., list[Path]]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "inductor": _inductor,
    "pt2": _pt2,
    "torchscript": _torchscript,
    "compressed-tensors": partial(_checkpoint, layout="compressed-tensors"),
    "gptq": partial(_checkpoint, layout="gptq"),
}
_LOWERED_ANEW = ("onnx", "openvino", "inductor")
_CHECKPOINTS = ("compressed-tensors", "gptq")
_ENDINGS = {"onnx": ".onnx", "openvino": ".xml", "inductor": ".pt2", "pt2": ".pt2"}
_NEXT = {
    "onnx": "  torch-quant inspect {out}   what onnxruntime runs in int8",
    "openvino": "  openvino.Core().compile_model({out!r}, 'CPU')",
    "inductor": "  torch._inductor.aoti_load_package({out!r}), or examples/cpp/run_package.cpp",
    "pt2": "  import torch_quant; torch.export.load({out!r}).module()",
    "torchscript": "  import torch_quant; torch.jit.load({out!r})",
    "compressed-tensors": "  torch_quant.load_checkpoint({out!r}), or vllm serve {out}",
    "gptq": "  torch_quant.load_checkpoint({out!r}), or vllm serve {out}",
}
