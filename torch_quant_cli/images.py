"""Images as tensors, prepared as the model's folder says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_quant_cli.exits import Failed
from torch_quant_cli.running import needed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["IMAGES", "images"]

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, where nothing else is said."""
_SIZE = 224


def images(folder: Path, model_folder: Path | None, samples: int, size: int | None) -> list[Tensor]:
    """The images of a folder and of those in it, ``[channels, height, width]`` each.

    The shorter side is scaled to ``size`` and the centre is cut out; pixels from 0 to 1 lose the
    mean and are divided by the deviation that ``preprocessor_config.json`` has, or ImageNet's.

    Args:
        folder: where they are.
        model_folder: of Hugging Face, or None.
        samples: how many at most.
        size: in pixels; None for what ``preprocessor_config.json`` or ``config.json`` says.

    Raises:
        Failed: there is no image, or one cannot be read.
    """
    needed("PIL", what=f"the folder of images {folder}")
    files = sorted(each for each in folder.rglob("*") if each.suffix.lower() in IMAGES)
    if not files:
        raise Failed(
            f"--data {folder} holds no image ({', '.join(IMAGES)}). Text and arrays are given as a "
            "file: a .txt, a .jsonl, a .npz"
        )
    processor = _read(model_folder, "preprocessor_config.json")
    config = _read(model_folder, "config.json")
    known = processor.get("crop_size") or processor.get("size") or config.get("image_size")
    pixels = size or _number(known) or _SIZE
    grey = config.get("num_channels") == 1
    mean = processor.get("image_mean") or ([0.5] if grey else _MEAN)
    std = processor.get("image_std") or ([0.5] if grey else _STD)
    return [_image(each, pixels, grey, mean, std) for each in files[:samples]]


def _read(folder: Path | None, name: str) -> dict[str, Any]:
    if folder is None or not (folder / name).is_file():
        return {}
    found = json.loads((folder / name).read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _number(size: Any) -> int | None:
    """Processors write a size as a number, or as a dictionary of one kind or another."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height") or size.get("longest_edge")
    if isinstance(size, (list, tuple)) and size:
        size = size[0]
    return size if isinstance(size, int) and size > 0 else None


def _image(file: Path, size: int, grey: bool, mean: Any, std: Any) -> Tensor:
    import numpy
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if grey else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise Failed(f"{file} cannot be read as an image: {error}") from error
    scale = size / min(image.size)
    wide, high = (max(size, round(each * scale)) for each in image.size)
    image = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = (wide - size) // 2, (high - size) // 2
    image = image.crop((left, top, left + size, top + size))
    x = torch.from_numpy(numpy.array(image, dtype="float32") / 255.0)
    x = x[..., None] if grey else x
    x = (x - torch.tensor(list(mean))) / torch.tensor(list(std))
    return x.permute(2, 0, 1).contiguous()
