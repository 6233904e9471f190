"""Saved folders: one JSON file and one safetensors file, written whole or not at all.

The JSON names the file of tensors by its content and holds its checksum, so a folder that is saved
anew always has two files that belong together, whenever the process is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_quant.errors import InvalidConfig
from torch_quant.io.data.narrow import narrowed, widened
from torch_quant.io.files import alone, save_tensors, staging
from torch_quant.io.kinds import what_it_holds
from torch_quant.version import __version__

__all__ = ["VERSION", "read_folder", "write_folder"]

VERSION = 3
"""Of the layout of folders and of what is in them. Since 2, integers may be of few bits; since 3,
attributes may hold tensors in lists and dictionaries."""
_TENSORS = "tensors-"
_OURS = re.compile(rf"{_TENSORS}[0-9a-f]{{16}}\.safetensors")
_CHUNK = 1 << 20
_ALIGNMENT = 64
"""Bytes of which PyTorch's addresses are multiples."""


def write_folder(
    path: str | os.PathLike[str], kind: str, data: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write ``data`` and ``tensors`` into the folder ``path``, which is made if need be.

    Args:
        path: the folder; what else it holds stays.
        kind: what is saved, ``"quantizer"``: the name of its JSON file.
        data: ready for JSON.
        tensors: by name. One tensor under several names is written once; strides are kept. Integers
            take the bits that they need.

    Raises:
        InvalidConfig: it cannot be written there, or a tensor is of a dtype without a form in the
            file; nothing of an earlier save is lost.
    """
    with _made(path) as folder, staging(folder / f"{kind}.json") as stage:
        stored, layout = _stored(tensors)
        file = stage / "tensors"
        save_tensors(stored, file)
        digest = _digest(file)
        named = f"{_TENSORS}{digest[:16]}.safetensors"
        whole = {
            "format": f"torch_quant {kind}",
            "version": VERSION,
            "torch_quant": __version__,
            "torch": torch.__version__,
            "tensors": {"file": named, "sha256": digest, "layout": layout},
            kind: dict(data),
        }
        whole["sha256"] = _checksum(whole)
        text = json.dumps(whole, indent=1, allow_nan=False)
        (stage / "json").write_text(text + "\n", encoding="utf-8")
        with alone(folder):
            os.replace(file, folder / named)
            os.replace(stage / "json", folder / f"{kind}.json")
            wanted = {_named(each) for each in folder.glob("*.json")}
            for each in folder.iterdir():  # of earlier saves, and of processes that were killed
                if _OURS.fullmatch(each.name) and each.name not in wanted:
                    each.unlink(missing_ok=True)


@contextlib.contextmanager
def _made(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The folder, made if it does not exist, and gone again if nothing can be written into it."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidConfig(f'cannot save to {path!r}; give a folder, as "model_int8"')
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise InvalidConfig(f"cannot save to {folder}: it is a file; give a folder")
    new = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InvalidConfig(
            f"cannot save to {folder}: {error.strerror}; give a folder in one that exists"
        ) from error
    try:
        yield folder
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _named(file: Path) -> str:
    """The file of tensors that a JSON file of ours names; empty for any other file."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["tensors"]["file"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _stored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the file holds, and how that differs: other names of a tensor, and its strides."""
    stored: dict[str, Tensor] = {}
    layout: dict[str, Any] = {}
    first: dict[int, str] = {}
    for name, x in tensors.items():
        if x.is_quantized or x.layout != torch.strided:
            raise InvalidConfig(
                f"the tensor {name} is of {x.dtype}, {x.layout}: it cannot be saved"
            )
        if x.device.type == "meta":
            raise InvalidConfig(
                f"the tensor {name} is on the meta device: it has no values to save"
            )
        if id(x) in first:
            layout[name] = {"same": first[id(x)]}
            continue
        first[id(x)] = name
        x = x.detach().to("cpu").resolve_conj().resolve_neg()
        if not x.is_contiguous() and _dense(x):
            layout[name] = {"strides": list(x.stride())}
        # A copy: safetensors refuses tensors that share memory.
        x = x.clone(memory_format=torch.contiguous_format)
        if x.is_complex():
            layout.setdefault(name, {})["complex"] = True
            x = torch.view_as_real(x)
        if (few := narrowed(x)) is not None:
            x, how = few
            layout.setdefault(name, {})["narrow"] = how
        stored[name] = x
    return stored, layout


def _dense(x: Tensor) -> bool:
    """Whether its elements fill a block of memory, in whichever order."""
    expected = 1
    for stride, size in sorted((x.stride(i), x.shape[i]) for i in range(x.dim()) if x.shape[i] > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _digest(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _checksum(whole: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in whole.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_folder(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`write_folder` wrote: the data, and the tensors by name.

    Raises:
        InvalidConfig: there is none; it is truncated, was changed since, is of something else, or
            of a newer version. Says which file.
    """
    file = Path(path) / f"{kind}.json"
    whole = _read_json(file, kind)
    version = whole.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise InvalidConfig(
            f"{file} has version {version!r}, of torch_quant {whole.get('torch_quant')}; this is "
            f"torch_quant {__version__}, which reads up to {VERSION}: install the newer one"
        )
    if whole.get("sha256") != _checksum(whole):
        raise InvalidConfig(f"{file} was changed after it was saved: its checksum is another")
    about = whole["tensors"]
    tensors = Path(path) / str(about["file"])
    if tensors.name != about["file"] or not tensors.is_file():
        raise InvalidConfig(f"{file} names the tensors {about['file']}, which is not beside it")
    if _digest(tensors) != about["sha256"]:
        raise InvalidConfig(
            f"{tensors} is truncated or was changed after it was saved: its checksum is another"
        )
    return whole[kind], _tensors(tensors, about["layout"])


def _read_json(file: Path, kind: str) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidConfig(
            f"cannot read {file}: {error.strerror}; give the folder that a {kind} was saved to"
            f"{what_it_holds(file.parent)}"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"{file} is no file of torch_quant") from error
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(f"{file} is truncated or no JSON: {error}") from error
    given = whole.get("format") if isinstance(whole, dict) else None
    if given != f"torch_quant {kind}":
        raise InvalidConfig(f"{file} is no saved {kind} of torch_quant: its format is {given!r}")
    return whole  # type: ignore[no-any-return]


def _aligned(x: Tensor) -> Tensor:
    """``x`` where PyTorch would have put it: float kernels sum in another order elsewhere."""
    return x.clone() if x.is_floating_point() and x.data_ptr() % _ALIGNMENT else x


def _tensors(file: Path, layout: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(str(file))
    except Exception as error:  # safetensors has several
        raise InvalidConfig(f"cannot read {file}: {error}") from error
    for name, each in layout.items():
        if "narrow" in each:
            try:
                found[name] = widened(found[name], each["narrow"])
            except (KeyError, TypeError, ValueError) as error:
                raise InvalidConfig(f"{file}: the tensor {name}: {error}") from error
        if each.get("complex"):
            found[name] = torch.view_as_complex(found[name])
        if "strides" in each:
            x = torch.empty_strided(found[name].shape, each["strides"], dtype=found[name].dtype)
            found[name] = x.copy_(found[name])
    found = {name: _aligned(x) for name, x in found.items()}
    return found | {name: found[each["same"]] for name, each in layout.items() if "same" in each}
