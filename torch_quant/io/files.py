"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from torch_quant.errors import InvalidConfig

try:
    import fcntl
except ImportError:  # not on Windows, where nothing tells a writer that was killed from a slow one
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "alone", "checked_target", "checked_target_folder", "new_folder", "put_back", "save_tensors",
    "staging", "write_atomically", "write_stream",
]  # fmt: skip

_MARK = "torch_quant-"
_EARLIER = "earlier"
"""What a new folder replaces, as long as that takes."""
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
"""The disk is full, the file too large for it, or the share of the user used up."""


def checked_target(path: str | os.PathLike[str], example: str = "model.pt") -> Path:
    """``path``, if a file can be written there; to be asked before any work.

    Args:
        path: of the file.
        example: what messages name.

    Raises:
        InvalidConfig: the path is empty, a folder or a device, or its folder does not exist or may
            not be written to.

    >>> checked_target("model.pt").name
    'model.pt'
    """
    try:
        text = os.fspath(path)
    except TypeError:
        text = None
    if not isinstance(text, str) or not text or "\0" in text:
        named = path is None or isinstance(path, (str, bytes, int))
        got = repr(path) if named else f"of type {type(path).__name__}"
        raise InvalidConfig(f'cannot write to the path {got}; give a file, as "{example}"')
    target = Path(text)
    try:
        reason = _obstacle(text, target, example)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        reason = f"{error.strerror}; give another path"
    if reason:
        raise InvalidConfig(f"cannot write {text}: {reason}")
    return target


def _obstacle(text: str, target: Path, example: str) -> str:
    """Why ``target`` cannot be written, with the fix, or an empty string."""
    if target.is_dir() or text.endswith(("/", os.sep)):
        return f"it is a folder; give a file in it, as {str(target / example)!r}"
    if target.exists() and not target.is_file():
        return "it is no regular file; give another path"
    if not target.parent.is_dir():
        return f"there is no folder {target.parent}; give a writable folder that exists"
    if not os.access(target.parent, os.W_OK | os.X_OK):
        return f"{target.parent} may not be written to; give a writable folder"
    return ""


def checked_target_folder(folder: str | os.PathLike[str], *, replace: bool = False) -> Path:
    """``folder``, if it can be made; to be asked before any work.

    Args:
        folder: which may exist if it is empty.
        replace: it may hold something.

    Raises:
        InvalidConfig: it exists, it has no name, or it would stand in a folder that does not exist.

    >>> checked_target_folder("model_int4").name
    'model_int4'
    """
    text = os.fspath(folder) if isinstance(folder, (str, os.PathLike)) else ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidConfig(f'cannot write to {folder!r}; give a folder, as "model_int4"')
    target = Path(text)
    if target.exists() and not (target.is_dir() and (replace or not any(target.iterdir()))):
        raise InvalidConfig(f"cannot write {target}: it exists already; give a new folder")
    if not target.absolute().parent.is_dir():
        raise InvalidConfig(
            f"cannot write {target}: there is no folder {target.parent}; mkdir -p {target.parent}"
        )
    return target


@contextlib.contextmanager
def staging(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder beside ``path`` to write into, gone afterwards.

    It is locked as long as it is used. Those that nobody holds were left by processes that were
    killed while they wrote to the same path; they are removed.

    Raises:
        InvalidConfig: nothing can be written there, or no more, as the disk is full.
    """
    target = checked_target(path)
    _remove_stale(target)
    with contextlib.ExitStack() as stack:
        folder = None
        while folder is None:
            try:
                made = Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target)))
            except OSError as error:
                raise InvalidConfig(
                    f"cannot write {target}: {error.strerror}; give a writable folder"
                ) from error
            stack.callback(_discard, made, target)
            try:
                stack.callback(_release, _lock(made))
            except BlockingIOError:
                continue  # another process took it for stale, before it was locked
            folder = made if made.is_dir() else None
        try:
            yield folder
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise InvalidConfig(
                f"cannot write {target}: {error.strerror}; what was there is unchanged. Free space "
                "on that disk, or give a path on another"
            ) from error


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], Any]) -> None:
    """Let ``write`` fill a temporary file, then put it in the place of ``path``: all or nothing.

    Raises:
        InvalidConfig: nothing can be written there.
    """
    target = checked_target(path)
    with staging(target) as folder:
        name = folder / target.name
        write(str(name))
        os.replace(name, target)


def write_stream(path: Path, save: Callable[[io.BytesIO], Any]) -> None:
    """Let PyTorch write into memory, and Python from there into a file.

    PyTorch's own writer of files ends the process where the disk is full.

    Raises:
        OSError: it cannot be written.
    """
    held = io.BytesIO()
    save(held)
    with held.getbuffer() as made:
        path.write_bytes(made)


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write them as safetensors.

    Raises:
        OSError: it cannot be written.
        InvalidConfig: safetensors has no form for one of them.
    """
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), str(file), metadata={"format": "pt"})
    except OSError:
        raise
    except Exception as error:  # safetensors tells errors of the system in words alone
        if number := _OS_ERROR.search(str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
        raise InvalidConfig(f"cannot write the tensors: {error}") from error


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` at the end: whole or not at all.

    Args:
        path: the folder; it may exist if it is empty.
        replace: put it in the place of one that holds something.

    Raises:
        InvalidConfig: it exists, or nothing can be written there.
    """
    target = Path(path)
    target = target if target.name else target.absolute()
    put_back(target)
    checked_target_folder(target, replace=replace)
    beside = target.with_name(f"{target.name}.json")
    with staging(beside) as stage:
        made = stage / target.name
        made.mkdir()
        yield made
        if target.exists():
            os.replace(target, stage / _EARLIER)  # staging puts it back, whatever ends this
        os.replace(made, target)


def put_back(folder: Path) -> None:
    """Put back what :func:`new_folder` had moved away when its process was killed, if it was."""
    _remove_stale(folder.with_name(f"{folder.name}.json"))


def _prefix(target: Path) -> str:
    return f".{target.name}.{_MARK}"


def _lock(folder: Path) -> int | None:
    """Lock it until the process ends, by a handle; None where folders cannot be locked.

    Raises:
        BlockingIOError: another process holds it.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes and threads that ask for it too from replacing files of the folder."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _remove_stale(target: Path) -> None:
    try:
        found = [each for each in target.parent.iterdir() if each.name.startswith(_prefix(target))]
    except OSError:  # the folder may be written to, but not listed
        return
    for folder in found:
        try:
            lock = _lock(folder)
        except BlockingIOError:
            continue  # somebody is writing
        if lock is not None:
            _discard(folder, target)
            os.close(lock)


def _discard(stage: Path, beside: Path) -> None:
    """Remove it, but for a folder that was moved into it for another that has not come."""
    target, earlier = beside.with_name(beside.name.removesuffix(".json")), stage / _EARLIER
    if earlier.is_dir() and not target.exists():
        try:
            os.replace(earlier, target)
        except OSError:  # what cannot be put back stays, for the next time
            return
    shutil.rmtree(stage, ignore_errors=True)
