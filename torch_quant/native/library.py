"""Finds and loads the library of kernels; nothing is built here.

It has a C interface, called by ``ctypes``, which lets other threads run meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from torch_quant.errors import InvalidConfig

__all__ = [
    "VARIABLE",
    "instruction_sets",
    "kernels",
    "run_call",
    "unavailable",
    "using",
]

VARIABLE = "TORCH_QUANT_KERNELS"
"""The environment variable that chooses instructions: a name of :func:`instruction_sets`."""

_NAME = "kernels.dll" if sys.platform == "win32" else "kernels.so"
_VERSION = 11
"""Of the interface; a library that was built from other sources has another."""
_BUILD = (
    "build them with a C++ compiler: pip install -e . in a checkout, or pip install torch_quant"
)

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_FLOAT = ctypes.c_float
_NONE = "none"


def _find(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and what is missing."""
    if not path.exists():
        return None, f"the kernels are not built: {_BUILD}"
    try:
        library = ctypes.CDLL(str(path))
        version = library.torch_quant_version()
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded ({error}): {_BUILD}"
    if version != _VERSION:
        return None, (
            f"{path} has interface {version}, this torch_quant wants {_VERSION}: {_BUILD}"
        )
    library.torch_quant_path.restype = library.torch_quant_used.restype = ctypes.c_char_p
    library.torch_quant_parallel.argtypes = [_POINTER]
    library.torch_quant_linear.argtypes = [_INT, *[_POINTER] * 7, *[_SIZE] * 5, *[_INT] * 3]
    library.torch_quant_linears.argtypes = [_INT, *[_POINTER] * 3, *[_SIZE] * 3]
    library.torch_quant_gated.argtypes = [_INT, *[_POINTER] * 3, *[_SIZE] * 4]
    library.torch_quant_dynamic.argtypes = [_INT, *[_POINTER] * 2, *[_SIZE] * 3, _INT]
    library.torch_quant_embedding.argtypes = [*[_POINTER] * 4, *[_SIZE] * 3]
    library.torch_quant_embedding.restype = _SIZE
    library.torch_quant_product.argtypes = [_INT, _POINTER]
    library.torch_quant_rows.argtypes = [_INT, _POINTER]
    norm: list[Any] = [_INT, *[_POINTER] * 5, *[_SIZE] * 2, *[ctypes.c_double] * 2]
    library.torch_quant_rms_norm.argtypes = norm
    library.torch_quant_recurrent.argtypes = [_INT, _POINTER]
    library.torch_quant_pack.argtypes = [_POINTER, *[_SIZE] * 3, *[_POINTER] * 2]
    library.torch_quant_pack.restype = None
    library.torch_quant_static.argtypes = [_INT, *[_POINTER] * 2, _SIZE, _POINTER]
    rounding: list[Any] = [_INT, *[_POINTER] * 5, *[_SIZE] * 2, *[_INT] * 2, _FLOAT, *[_INT] * 2]
    library.torch_quant_round.argtypes, library.torch_quant_round.restype = rounding, None
    gradient: list[Any] = [_INT, *[_POINTER] * 8, *[_SIZE] * 2, *[_INT] * 2, _FLOAT]
    library.torch_quant_round_gradient.argtypes = gradient
    forward: list[Any] = [_INT, *[_POINTER] * 10, *[_SIZE] * 3, *[_INT] * 2, *[_FLOAT] * 3]
    library.torch_quant_refold.argtypes = forward
    backward: list[Any] = [_INT, *[_POINTER] * 8, *[_SIZE] * 3, *[_INT] * 2, _FLOAT]
    library.torch_quant_refold_gradient.argtypes = backward
    library.torch_quant_parallel(_openmp())
    return library, ""


def _openmp() -> ctypes.c_void_p:
    """How PyTorch's own OpenMP library runs threads; null where it does not say."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, _POINTER)
    except (AttributeError, OSError, TypeError):
        return _POINTER()


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    library, why = _find(Path(__file__).with_name(_NAME))
    wanted = os.environ.get(VARIABLE, "").strip().lower()
    if library is not None and wanted and wanted != _NONE:
        _use(library, wanted, f"the environment variable {VARIABLE}")
    return (None, f"{VARIABLE}={_NONE} forbids them") if wanted == _NONE else (library, why)


def unavailable() -> str | None:
    """Why the kernels do not run here and how to get them, or None."""
    return _loaded()[1] or None


def instruction_sets() -> tuple[str, ...]:
    """The kernels that run on this CPU, the fastest last; none if the library is missing.

    >>> set(instruction_sets()) <= {"plain", "avx2", "avxvnni", "avx512vnni"}
    True
    """
    library = _loaded()[0]
    return () if library is None else _names(library)


def _names(library: ctypes.CDLL) -> tuple[str, ...]:
    return tuple(library.torch_quant_path(i).decode() for i in range(library.torch_quant_paths()))


def _use(library: ctypes.CDLL, name: str, where: str) -> None:
    names = _names(library)
    if name not in names:
        raise InvalidConfig(f"{where} names {name!r}; this CPU runs {', '.join(names)}")
    library.torch_quant_use(names.index(name))


@contextlib.contextmanager
def using(instructions: str) -> Iterator[None]:
    """Run the kernels of one instruction set, in all threads of the process.

    Args:
        instructions: a name of :func:`instruction_sets`.

    Raises:
        InvalidConfig: the library is missing, or this CPU does not have these instructions.
    """
    library, why = _loaded()
    if library is None:
        raise InvalidConfig(f"using({instructions!r}): {why}")
    before = library.torch_quant_used().decode()
    _use(library, instructions, f"using({instructions!r})")
    try:
        yield
    finally:
        _use(library, before, "using")


def kernels() -> ctypes.CDLL | None:
    """The library; None where it is missing, of which the first call warns."""
    library, why = _loaded()
    if library is None:
        _warn(why)
    return library


def run_call(function: str, call: bytes, otherwise: str) -> None:
    """Call a function of the library that takes one structure; the library is there.

    Args:
        function: its name.
        call: the structure.
        otherwise: what to say where it has no memory.

    Raises:
        MemoryError: it has none.
    """
    library = kernels()
    assert library is not None
    if getattr(library, function)(torch.get_num_threads(), call):
        raise MemoryError(otherwise)


@functools.cache
def _warn(why: str) -> None:
    warnings.warn(
        f"torch_quant computes with dequantized weights, which is slow: {why}", stacklevel=2
    )
