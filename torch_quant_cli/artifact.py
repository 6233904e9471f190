"""The folder that ``torch-quant quantize`` writes, and that all other commands read.

It holds the quantized model (``model.json``), the calibration (``quantizer.json``), a batch of the
data, what says how the model is built (``config.json``, the tokenizer), and in ``torch-quant.json``
what it was made of.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torch_quant_cli.exits import Failed
from torch_quant_cli.models import ARTIFACT, Source, float_model, skeleton, source_of
from torch_quant_cli.texts import TOKENIZER_FILES

if TYPE_CHECKING:
    from torch import nn

    from torch_quant import Quantizer

__all__ = ["Artifact", "check_above", "check_out", "is_artifact", "write_artifact"]

VERSION = 1
_EXAMPLE = "example.safetensors"
_COPIED = (*TOKENIZER_FILES, "config.json", "generation_config.json", "preprocessor_config.json")
_NAMED = "|".join(
    re.escape(name) for name in (ARTIFACT, _EXAMPLE, *_COPIED, "model.json", "quantizer.json")
)
_OURS = re.compile(rf"{_NAMED}|tensors-[0-9a-f]+\.safetensors|\..*\.torch_quant-.*")


def is_artifact(path: str) -> bool:
    """Whether a path is such a folder."""
    return (Path(path) / ARTIFACT).is_file()


def check_out(out: str, overwrite: bool) -> Path:
    """The folder to write; raises :class:`Failed` if there is something, before any work."""
    try:
        path = Path(out).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise Failed(f"--out {out}: {error}; give the name of a new folder") from error
    _put_back(path)
    if path.is_dir() and any(path.iterdir()):
        if not is_artifact(out):
            raise Failed(
                f"--out {out} exists and is no folder of torch-quant, so it is left alone: give "
                "another name"
            )
        if not overwrite:
            raise Failed(f"--out {out} exists: give another name, or --overwrite to replace it")
        if strange := sorted(x.name for x in path.iterdir() if not _OURS.fullmatch(x.name)):
            named = ", ".join(strange[:5]) + (" ..." if len(strange) > 5 else "")
            raise Failed(
                f"--out {out} holds {named} too, which --overwrite would remove: move it away, or "
                "give another name"
            )
    elif path.exists() and not path.is_dir():
        raise Failed(f"--out {out} is a file: give the name of a new folder")
    check_above(out)
    return path


def check_above(out: str) -> None:
    """Raise :class:`Failed` if a file or folder would stand in a folder that does not exist."""
    path = Path(out)
    above = path.resolve().parent if path.is_symlink() else path.parent
    if not above.is_dir():
        raise Failed(f"--out {out}: there is no folder {above}; mkdir -p {above}")


def _put_back(path: Path) -> None:
    """What an overwrite that was killed had moved away; it is to be overwritten on purpose only."""
    prefix = f".{path.name}.json.torch_quant-"
    if path.exists() or not path.parent.is_dir():
        return
    if any(each.name.startswith(prefix) for each in path.parent.iterdir()):
        from torch_quant.io.files import put_back

        put_back(path)


def write_artifact(
    out: Path,
    quantizer: Quantizer,
    quant_model: nn.Module,
    source: Source,
    about: Mapping[str, Any],
    example: Any,
) -> None:
    """Write the folder, whole or not at all.

    Args:
        out: where; what is there already is replaced.
        quantizer: has the calibration.
        quant_model: is saved.
        source: where the float model was.
        about: what else is to be known of the run, as JSON.
        example: a batch, or None to keep none.
    """
    import torch_quant
    from torch_quant.io.files import new_folder

    with new_folder(out, replace=True) as folder:
        torch_quant.save(quant_model, folder)
        quantizer.save(folder)
        kept = example is not None and _write_example(folder / _EXAMPLE, example)
        if source.kind == "folder":
            for name in _COPIED:
                if (Path(source.path) / name).is_file():
                    shutil.copyfile(Path(source.path) / name, folder / name)
        data = {
            "format": "torch-quant",
            "version": VERSION,
            "torch_quant": torch_quant.__version__,
            "model": source.to_dict(),
            "example": kept,
            **about,
        }
        (folder / ARTIFACT).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _write_example(file: Path, example: Any) -> bool:
    """Whether a batch is tensors by name or position, and so could be written."""
    from torch import Tensor

    from torch_quant.io.files import save_tensors

    if isinstance(example, Mapping):
        tensors = {f"name.{name}": x for name, x in example.items()}
    else:
        given = example if isinstance(example, tuple) else (example,)
        tensors = {f"position.{i}": x for i, x in enumerate(given)}
    if not tensors or not all(isinstance(x, Tensor) for x in tensors.values()):
        return False
    save_tensors({name: x.contiguous().clone() for name, x in tensors.items()}, file)
    return True


class Artifact:
    """Such a folder, read as far as it is asked for.

    Args:
        folder: where it is.
        model: another place of the float model than where it was, as MODEL.
        factory: the same, as ``--factory``.

    Raises:
        Failed: there is none, or of a newer version.
    """

    def __init__(self, folder: str, model: str | None = None, factory: str | None = None) -> None:
        self.folder = Path(folder)
        file = self.folder / ARTIFACT
        if not self.folder.exists():
            raise Failed(f"there is no folder {folder}; torch-quant quantize ... --out makes one")
        if not file.is_file():
            raise Failed(
                f"{folder} has no {ARTIFACT}: expected a folder that torch-quant quantize wrote"
            )
        try:
            self.about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            self.source = Source(**self.about["model"])
            version = int(self.about["version"])
        except (ValueError, TypeError, KeyError) as error:
            raise Failed(f"{file} is damaged ({error}): quantize the model again") from error
        if version > VERSION:
            raise Failed(f"{file} is of torch_quant {self.about.get('torch_quant')}: install that")
        self._told = model is not None
        if model is not None:
            self.source = source_of(model, factory)

    @property
    def hugging_face(self) -> Path | None:
        """The folder with the tokenizer and the configuration, or None."""
        return self.folder if (self.folder / "config.json").is_file() else None

    def float_model(self) -> nn.Module:
        """The model that was quantized."""
        self._tell()
        return float_model(self.source)

    def quant_model(self) -> nn.Module:
        """The quantized model, as it was saved."""
        import torch_quant

        self._tell()
        return torch_quant.load(self.folder, skeleton(self.source, self.folder))

    def _tell(self) -> None:
        """Name, once, the function that the folder says and that is going to be called."""
        if self.source.kind == "factory" and not self._told:
            file = self.folder / ARTIFACT
            click.echo(f"{file} names {self.source.factory}, which is called", err=True)
        self._told = True

    def quantizer(self) -> Quantizer:
        """What calibrated it."""
        from torch_quant import Quantizer

        return Quantizer.load(self.folder)

    def example(self) -> Any:
        """The batch that was kept, or None."""
        from safetensors.torch import load_file

        if not (self.folder / _EXAMPLE).is_file():
            return None
        tensors = load_file(str(self.folder / _EXAMPLE))
        if all(name.startswith("name.") for name in tensors):
            return {name.partition(".")[2]: x for name, x in tensors.items()}
        return tuple(tensors[f"position.{i}"] for i in range(len(tensors)))
