"""Files are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch_quant.errors import InvalidConfig

__all__ = ["write_atomically"]


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it: all or nothing.

    Raises:
        InvalidConfig: the folder does not exist or may not be written to.
    """
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise InvalidConfig(
            f"cannot write {target}: {error.strerror}; give a writable folder"
        ) from error
    os.close(handle)
    try:
        write(name)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # a temporary file is private
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
