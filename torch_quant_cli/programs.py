"""Programs of ``torch.export``, whose pickles are read as plain data before any of them is run."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from torch_quant_cli.exits import Failed

__all__ = ["check_pickles"]

_OBJECTS = ("custom_obj", "opaque_obj")
"""Files of constants that are objects, and no tensors."""


def check_pickles(file: Path) -> None:
    """Read all pickles of a ``.pt2`` with ``weights_only``, which runs none of their code.

    Raises:
        Failed: one of them holds more than tensors and plain values; nothing of it was run.
    """
    import torch

    try:
        with zipfile.ZipFile(file) as opened:
            for name, content in _pickles(opened):
                try:
                    torch.load(io.BytesIO(content), weights_only=True)
                except Exception as error:
                    first = (str(error).strip().splitlines() or [""])[0][:200]
                    raise Failed(
                        f"{file}: {name} in it holds more than tensors, and reading that can run "
                        f"any code, so it is not loaded ({type(error).__name__}: {first}). Export "
                        "the model with tensors for example inputs, and without objects"
                    ) from error
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failed(f"{file} is no file of torch.export.save: {error}") from error


def _pickles(opened: zipfile.ZipFile) -> Iterator[tuple[str, bytes]]:
    """Every file that ``torch.export.load`` would unpickle, and those that look like one.

    Files of one name are all read, since readers differ in which they take.
    """
    named: set[str] = set()
    for info in opened.infolist():
        if info.filename.endswith("_config.json"):
            payloads = json.loads(opened.read(info)).get("config", {})
            named |= {
                Path(str(each["path_name"])).name
                for each in payloads.values()
                if each.get("use_pickle") or str(each["path_name"]).startswith(_OBJECTS)
            }
    for info in opened.infolist():
        name = Path(info.filename).name
        old = name.startswith("serialized_") and not name.startswith("serialized_exported")
        if name.endswith(".pt") or name in named or name.startswith(_OBJECTS) or old:
            yield info.filename, opened.read(info)
