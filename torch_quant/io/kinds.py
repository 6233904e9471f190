"""What a path holds, and which call reads that: for errors of whoever was given another kind."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["what_it_holds"]

_FILES = {
    ".pt2": "an exported program: torch.export.load",
    ".npz": "arrays: they are data for calibration",
}
_FORMATS = {
    "torch_quant summary": "a summary: quantizer.load_summary(path)",
    "torch_quant model": "a part of a saved model: torch_quant.load(its folder, model=model)",
    "torch_quant quantizer": "a part of a saved quantizer: Quantizer.load(its folder)",
}


def what_it_holds(path: str | os.PathLike[str]) -> str:
    """The end of a message: what is there, and which call reads it.

    Args:
        path: a folder or a file, which need not exist.

    >>> what_it_holds("nowhere/at_all")
    '; there is no file or folder of that name'
    """
    place = Path(path)
    if place.is_dir():
        return f"; {_folder(place)}"
    if place.is_file():
        return f"; it is {_file(place)}"
    return "; there is no file or folder of that name"


def _folder(place: Path) -> str:
    found = []
    if (place / "model.json").is_file():
        found.append("a quantized model: torch_quant.load(folder, model=model)")
    if (place / "quantizer.json").is_file():
        found.append("a quantizer with its ranges: Quantizer.load(folder)")
    if (place / "config.json").is_file():
        if "quantization_config" in _json(place / "config.json"):
            found.append("a checkpoint of quantized weights: load_checkpoint(folder)")
        else:
            found.append("a float model of transformers: AutoModel.from_pretrained(folder)")
    return f"it holds {' and '.join(found)}" if found else f"{_entries(place)}"


def _entries(place: Path) -> str:
    names = sorted(each.name for each in place.iterdir())
    more = ", ..." if len(names) > 4 else ""
    return f"it holds {', '.join(names[:4])}{more}" if names else "it is empty"


def _file(place: Path) -> str:
    if place.suffix in _FILES:
        return _FILES[place.suffix]
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(place) as archive:
        script = any(name.endswith("/constants.pkl") for name in archive.namelist())
        return "TorchScript: torch.jit.load" if script else "of torch.save: torch.load"
    data = _json(place)
    if str(data.get("format")) in _FORMATS:
        return _FORMATS[str(data["format"])]
    if place.suffix in (".yaml", ".yml") or {"backend", "qconfig", "overrides"} & data.keys():
        return "a configuration: Quantizer.from_config(path)"
    return "a file, and this is about folders"


def _json(file: Path) -> Mapping[str, Any]:
    """The object in a file, empty if it is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
