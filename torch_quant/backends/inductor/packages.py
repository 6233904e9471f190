"""A lowered graph compiled ahead of time: AOTInductor's package, one file with code and weights."""

from __future__ import annotations

import atexit
import io
import os
import re
import warnings
import weakref
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.backends.inductor.products import codes_of
from torch_quant.errors import UnsupportedOp
from torch_quant.graph.progress import progress

__all__ = ["PackagedSession", "compile_package", "planned_products"]

_SETTINGS: dict[str, Any] = {"freezing": True, "cpp.dynamic_threads": True}
"""Weights are constants, without which no product is fused; threads are those of the call."""
_FUSED = re.compile(rb"\baoti_torch_cpu__q(?:linear|conv\w*)_pointwise\w*\(")
_MOST_RUNNERS = 8


def compile_package(exported: Any, file: Path, settings: Mapping[str, Any], what: str) -> int:
    """Compile a program into a package.

    Args:
        exported: what ``torch.export`` gave.
        file: where to write; ends in ``.pt2``.
        settings: of Inductor, which go before those chosen here.
        what: is compiled, for the line that shows how long it takes.

    Returns:
        How many of its products run on int8 kernels.

    Raises:
        UnsupportedOp: Inductor or the C++ compiler fails; quotes why.
        OSError: the file cannot be written.
    """
    import torch._inductor

    held = io.BytesIO()  # PyTorch's writer of files ends the process where the disk is full
    with progress(what, "compiling"), torch.no_grad(), _quiet():
        try:
            torch._inductor.aoti_compile_and_package(
                exported, package_path=held, inductor_configs={**_SETTINGS, **settings}
            )
        except Exception as error:  # of Inductor's, of the compiler's: unrelated classes
            raise UnsupportedOp(f"Inductor does not compile it: {_told(error)}") from error
    with held.getbuffer() as made:
        file.write_bytes(made)
    return _fused(file)


def _told(error: Exception) -> str:
    """What a compiler complains of, or the first lines; it quotes its whole command before."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line for line in lines if " error: " in line or ": fatal " in line]
    return f"{type(error).__name__}: {' '.join((errors or lines)[:3])[:500]}"


def planned_products(body: fx.GraphModule) -> int:
    """How many products of a lowered graph multiply quantized weights."""
    return sum(codes_of(node) is not None for node in body.graph.nodes)


def _fused(file: Path) -> int:
    with zipfile.ZipFile(file) as package:
        sources = [name for name in package.namelist() if name.endswith(".cpp")]
        return sum(len(_FUSED.findall(package.read(name))) for name in sources)


_LOADED: weakref.WeakSet[PackagedSession] = weakref.WeakSet()


@atexit.register
def _unload() -> None:
    """Loaders have folders of their own, which they remove when they go."""
    for each in list(_LOADED):
        del each.loader


class PackagedSession:
    """A package that is loaded. Threads may call it at once.

    Args:
        file: the package, of which nothing is read later.
    """

    def __init__(self, file: Path) -> None:
        runners = min(os.cpu_count() or 1, _MOST_RUNNERS)
        with _quiet():
            self.loader = torch._C._aoti.AOTIModelPackageLoader(
                str(file), "model", False, runners, -1
            )
        _LOADED.add(self)

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.loader.run(list(tensors))


class _quiet(warnings.catch_warnings):
    """Inductor warns of matters that are not the user's."""

    def __enter__(self) -> Any:
        found = super().__enter__()
        warnings.simplefilter("ignore")
        return found
