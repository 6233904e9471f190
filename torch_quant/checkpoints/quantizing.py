"""Quantize a float checkpoint into another one, with the memory of a few of its tensors."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_quant.algorithms import DEFAULT_METHOD, without_data
from torch_quant.checkpoints.files import CONFIG, CheckpointFiles
from torch_quant.checkpoints.float_files import FloatFiles
from torch_quant.checkpoints.layout import Layout
from torch_quant.checkpoints.loading import example_of
from torch_quant.checkpoints.shards import Shards
from torch_quant.checkpoints.skeletons import built, config_of
from torch_quant.checkpoints.writing import check_held, checked_layout, describe
from torch_quant.convert.codes import QuantizedWeight
from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.core.qparams import QParams
from torch_quant.core.rounded import RoundedWeights
from torch_quant.core.telling import at_site, told_together
from torch_quant.errors import InvalidConfig, QuantError
from torch_quant.io.files import checked_target_folder, new_folder
from torch_quant.proxies.values import plain
from torch_quant.quantizer import Quantizer
from torch_quant.quantizer_base import tell_of
from torch_quant.rounding import FloatWeights, round_weights
from torch_quant.session import Session

__all__ = ["quantize_checkpoint"]

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".index.json",
)  # fmt: skip
"""Endings of files that hold weights, or say where they are."""


def quantize_checkpoint(
    quantizer: Quantizer,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: str = "compressed-tensors",
    *,
    batches: Iterable[Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    example_inputs: Any = None,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 2**30,
    progress: bool = True,
) -> Path:
    """Quantize a float checkpoint of transformers whose model need not fit into memory.

    Weights are read when they are wanted and written when they are rounded: without data one at a
    time, and with ``batches`` a block of the model at a time, as :meth:`Quantizer.round_weights`
    does. What is written is what :func:`torch_quant.export_checkpoint` writes of the whole model,
    in several files.

    Args:
        quantizer: how; weights alone, or with dynamic activations. It does not change.
        source: ``config.json`` and safetensors in float32, float16 or bfloat16.
        target: a new folder, or an empty one; it is written whole or not at all. Tokenizers and
            other small files of ``source`` are copied.
        format: as for :func:`torch_quant.export_checkpoint`.
        batches: inputs of the model for weight methods with data: token ids of shape ``[batch,
            length]``, say. Embeddings are then held in float32.
        folder: keep finished blocks there; a later call with the same checkpoint, settings and
            data goes on from them.
        example_inputs: a call of the model; by default a few tokens as ``input_ids``.
        dtype: of all that is not integers, scales included: float32, float16 or bfloat16.
        shard_bytes: of each file that is written, and held before.
        progress: show a bar on stderr where ``batches`` take more than two seconds.

    Returns:
        The folder.

    Raises:
        InvalidConfig: ``source`` is no float checkpoint of transformers, or damaged; a layer that
            the format cannot hold; a weight method that wants data and gets none, or works outside
            of the model's blocks; a transform; a folder that is not empty or cannot be written.
        BackendUnavailable: transformers is not installed.
        QuantError: a weight cannot be rounded; names the layer.

    >>> from torch_quant import recipes
    >>> quantizer = Quantizer("reference", qconfig=recipes.int4_weight_only())
    >>> quantize_checkpoint(quantizer, "nowhere", "int4")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torch_quant.errors.InvalidConfig: cannot read nowhere/config.json: No such file ...
    """
    if not isinstance(quantizer, Quantizer):
        raise InvalidConfig(
            f"expected a Quantizer, got {type(quantizer).__name__}: "
            "quantize_checkpoint(quantizer, source, target)"
        )
    if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise InvalidConfig(f"shard_bytes={shard_bytes!r}; expected a number of bytes from 1 on")
    layout, target = checked_layout(format, dtype), checked_target_folder(target)
    files = CheckpointFiles(source)
    if "quantization_config" in files.config:
        raise InvalidConfig(
            f"{files.folder} is quantized already: torch_quant.load_checkpoint(folder) runs it"
        )
    kept = None if batches is None else _listed(batches)
    if kept is None and folder is not None:
        raise InvalidConfig(
            f"folder={folder!r} keeps blocks that are rounded with data: "
            "quantize_checkpoint(..., batches=[ids, ...])"
        )
    skeleton = built(files, hollow=True)
    floats = FloatFiles(files, skeleton, whole=kept is not None)
    example = example_of(skeleton) if example_inputs is None else example_inputs
    with quantizer.state.lock, told_together():
        _, session = quantizer._ready(skeleton, None, example, "quantize_checkpoint")
        plan = session.plan()
        tell_of(session, plan)
        _check(plan, kept is not None)
    with new_folder(target) as made, torch.inference_mode(False), torch.no_grad():
        writer = _Writer(layout, plan, skeleton, floats, Shards(made, shard_bytes), dtype)
        if kept is not None:
            _round(writer, session, kept, folder, progress)
        config = writer.rest()
        for file in sorted(files.folder.iterdir()):
            if file.is_file() and file.name != CONFIG and not file.name.endswith(_WEIGHTS):
                shutil.copyfile(file, made / file.name)
        (made / CONFIG).write_text(config.to_json_string(), encoding="utf-8")
    return target


def _listed(batches: Iterable[Any]) -> list[Any]:
    if not isinstance(batches, Iterable) or isinstance(batches, (Tensor, dict, str)):
        raise InvalidConfig(
            f"quantize_checkpoint: batches is a {type(batches).__name__}; expected a list or a "
            "generator of inputs of the model: [ids]"
        )
    if not (kept := list(batches)):
        raise InvalidConfig(
            "quantize_checkpoint: there is nothing in batches; give inputs of the model: [ids]"
        )
    return kept


def _check(plan: QuantPlan, data: bool) -> None:
    """Raise for what cannot be done a weight, or a block, at a time."""
    quantized = [entry for entry in plan.values() if entry.quantized]
    if not any(entry.op == "linear" for entry in quantized):
        why = next((entry.reason for entry in plan.values() if entry.reason), "")
        raise InvalidConfig(f"no linear layer of the model is to be quantized{why and ': '}{why}")
    for entry in quantized:
        if entry.transforms:
            raise InvalidConfig(
                f"{entry.name}: {entry.transforms[0]} changes what is around the layer; "
                "quantize_checkpoint only rounds. Leave it out, or quantize the loaded model"
            )
        method = entry.method or DEFAULT_METHOD
        if not data and (method.wants_statistics or method.wants_blocks):
            raise InvalidConfig(
                f"{entry.name} is to be rounded with data, by {method}: "
                "quantize_checkpoint(..., batches=[ids, ...])"
            )


def _round(
    writer: _Writer, session: Session, batches: list[Any], folder: Any, progress: bool
) -> None:
    sites = [site for site, _ in session.captured.sites()]
    whole = session.captured.plain_weights()
    batches = torch.utils._pytree.tree_map_only(Tensor, plain, batches)
    with told_together():
        made, _ = round_weights(
            writer.skeleton, sites, writer.plan, whole, batches,
            folder=folder, show_progress=progress, floats=_Lent(writer),
        )  # fmt: skip
    writer.left_out = frozenset(made.left_out)


class _Lent(FloatWeights):
    """Float weights from files for the time that a block takes; its codes go to other files."""

    elsewhere = True

    def __init__(self, writer: _Writer) -> None:
        self.writer, self.files = writer, writer.floats

    def begin(self, twin: nn.Module, blocks: Iterable[str]) -> None:
        head = getattr(self.writer.skeleton, "get_output_embeddings", lambda: None)()
        inside = tuple(f"{path}." for path in blocks)
        for path, module in self.writer.skeleton.named_modules():
            if module is not head and not f"{path}.".startswith(inside):
                self.files.fill(twin.get_submodule(path), path)

    def stored(self, name: str, x: nn.Parameter) -> Tensor:
        self.files.close()
        return self.files.stored(name)

    @contextmanager
    def lent(self, path: str, block: nn.Module) -> Iterator[None]:
        before = {}
        for name, module in block.named_modules():
            before[module] = dict(module._parameters)
            self.files.fill(module, f"{path}.{name}".strip("."))
        try:
            yield
        finally:
            for module, parameters in before.items():
                module._parameters.update(parameters)
            self.files.close()

    def take(self, made: RoundedWeights) -> None:
        for site, each in made.sites.items():
            self.writer.linear(self.writer.plan[site], each.codes, each.qparams)


class _Writer:
    """Writes what is rounded.

    Args:
        layout: how.
        plan: what is quantized.
        skeleton: the model, without weights.
        floats: has these.
        shards: takes tensors.
        dtype: of what is not integers.
    """

    def __init__(
        self,
        layout: Layout,
        plan: QuantPlan,
        skeleton: nn.Module,
        floats: FloatFiles,
        shards: Shards,
        dtype: torch.dtype,
    ) -> None:
        self.layout, self.plan, self.skeleton = layout, plan, skeleton
        self.floats, self.shards, self.dtype = floats, shards, dtype
        self.modules = dict(skeleton.named_modules(remove_duplicate=False))
        self.entries: dict[str, SitePlan] = {}
        """By module; of sites that one module computes, the first."""
        for entry in plan.values():
            if entry.quantized and entry.weight is not None:
                self.entries.setdefault(entry.name.partition("@")[0], entry)
        for module, entry in self.entries.items():
            self._check(module, entry)
        self.written: dict[str, QuantizedWeight] = {}
        """The linear layers, by module, without their integers."""
        self.left_out: frozenset[str] = frozenset()

    def _check(self, module: str, entry: SitePlan) -> None:
        """Raise for a layer that the layout does not hold, before its weight is known."""
        spec, floats = entry.weight, self.floats
        assert spec is not None
        if f"{module}.weight" not in floats.names:
            raise InvalidConfig(
                f"{module} cannot be written as {self.layout.name}: its weight is no tensor of the "
                f"checkpoint by itself ({entry.op}). Leave it in float, "
                f"Quantizer(overrides={{{module!r}: None}})"
            )
        if entry.op != "embedding":
            spec, shape = spec.on(0), tuple(self.modules[module]._parameters["weight"].shape)
            grid = spec.granularity.grid(shape)
            zero = torch.full((), int(not spec.symmetric), dtype=spec.zero_point_dtype)
            qparams = QParams(spec, torch.ones(()).expand(grid), zero.expand(grid))
            weight = _weight(entry, torch.zeros((), dtype=spec.dtype).expand(shape), qparams)
            check_held(self.layout, module, self.modules[module], weight)

    def linear(self, entry: SitePlan, codes: Tensor, qparams: QParams) -> None:
        """Write a weight ``[out, in]``; raises where the layout does not hold it."""
        weight = _weight(entry, codes, qparams)
        check_held(self.layout, weight.module, self.modules.get(weight.module), weight)
        for ending, x in self.layout.tensors(weight, self.dtype).items():
            self.shards.add(f"{weight.module}.{ending}", x)
        nothing = torch.zeros(0, dtype=codes.dtype)
        zero = weight.zero_point.any().reshape(1)
        self.written[weight.module] = replace(weight, codes=nothing, scale=nothing, zero_point=zero)

    def rest(self) -> Any:
        """Write what is not written yet.

        Returns:
            The configuration, which says what is in the folder.
        """
        tied = True
        for names in dict.fromkeys(self.floats.names.values()):
            kinds = set()
            floats: list[tuple[str, SitePlan | None]] = []
            for name in names:
                module, _, last = name.rpartition(".")
                how = self.entries.get(module) if last == "weight" else None
                if how is None or how.op == "embedding":
                    kinds.add(how and (how.weight, how.method))
                    floats.append((name, how))
                elif module not in self.written:
                    self.linear(how, *self._rounded(how, name))
            together = len(floats) == len(names) and len(kinds) == 1
            tied = tied and (together or len(names) == 1)
            for name, how in floats[: 1 if together else None]:
                self.shards.add(name, self._float(name, how))
            self.floats.close()
        self.shards.finish()
        config = copy.deepcopy(config_of(self.skeleton))
        in_float = [
            name
            for name, module in self.skeleton.named_modules()
            if isinstance(module, nn.Linear) and name not in self.written
        ]
        order = {name: i for i, name in enumerate(self.entries)}
        written = dict(sorted(self.written.items(), key=lambda each: order[each[0]]))
        about = self.layout.config(written, in_float)
        describe(config, type(self.skeleton), self.dtype, tied, about)
        return config

    def _rounded(self, entry: SitePlan, name: str) -> tuple[Tensor, QParams]:
        assert entry.weight is not None
        method = entry.method or DEFAULT_METHOD
        if entry.name in self.left_out:
            method = without_data(method)
        try:
            with at_site(entry.name):
                return method.quantize(self.floats.read(name), entry.weight.on(0), {})
        except QuantError as error:
            raise QuantError(f"the weight of {entry.name}: {error}; fix the weights") from error

    def _float(self, name: str, entry: SitePlan | None) -> Tensor:
        if entry is not None:
            return _weight(entry, *self._rounded(entry, name)).values().to(self.dtype)
        x = self.floats.stored(name)
        if not x.is_floating_point():
            return x.clone()
        return x.to(self.dtype, copy=True)


def _weight(entry: SitePlan, codes: Tensor, qparams: QParams) -> QuantizedWeight:
    dtype = qparams.spec.zero_point_dtype
    zero_point = qparams.zero_point.to(dtype)
    return QuantizedWeight(entry.name, entry, codes, qparams.scale, zero_point, frozenset())
