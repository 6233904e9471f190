"""Finished blocks of a rounding that was interrupted, in a folder beside ``--out``."""

from __future__ import annotations

from pathlib import Path

from torch_quant_cli.exits import Failed

__all__ = ["checked_unfinished"]

_MARK = "rounded.json"
"""What the rounding keeps of each block, in a folder of its name."""
_KEPT = (_MARK, f".{_MARK}.", "tensors-")


def checked_unfinished(out: Path) -> Path:
    """Where finished blocks are kept until the whole is done, which removes the folder.

    Raises:
        Failed: something is there that no rounding wrote.
    """
    path = out.with_name(f"{out.name}.unfinished")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise Failed(f"{path} is no folder: finished blocks are kept there, so move it away")
    held = sorted(path.iterdir()) if path.is_dir() else []
    for each in held:
        if not each.is_dir() or not _of_rounding(each):
            raise Failed(
                f"{path} holds {each.name}, which no rounding wrote: finished blocks are kept "
                "there, and removed in the end. Move it away, or give another --out"
            )
    return path


def _of_rounding(block: Path) -> bool:
    names = [each.name for each in block.iterdir()]
    return all(name.startswith(_KEPT) for name in names)
