"""Where a float model comes from: a Hugging Face folder, a program, or a function with weights."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_quant_cli.exits import Failed
from torch_quant_cli.programs import check_pickles
from torch_quant_cli.running import needed

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ARTIFACT", "Source", "float_model", "imported", "skeleton", "source_of"]

ARTIFACT = "torch-quant.json"
"""The file that says what a folder of ``torch-quant quantize`` was made of."""
_NAMED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_STATES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Source:
    """A float model that can be loaded again.

    Args:
        kind: ``"folder"`` of Hugging Face, ``"program"`` of ``torch.export``, or ``"factory"``, a
            function that makes the model.
        path: of the folder, the program, or the weights that the model gets; may be empty then.
        factory: ``package.module:function``.
    """

    kind: str
    path: str = ""
    factory: str = ""

    @property
    def shown(self) -> str:
        """What the user gave.

        >>> Source("factory", "w.safetensors", "mine:make").shown
        'w.safetensors, mine:make'
        """
        return ", ".join(each for each in (self.path, self.factory) if each)

    def to_dict(self) -> dict[str, str]:
        """For JSON, with a path that holds wherever a later command runs."""
        return asdict(self) | ({"path": os.path.abspath(self.path)} if self.path else {})


def source_of(model: str, factory: str | None) -> Source:
    """What MODEL and ``--factory`` stand for; nothing is loaded yet.

    Raises:
        Failed: it is nothing that a model can be loaded from; says what to give.
    """
    path = Path(model)
    if factory is not None and not _NAMED.fullmatch(factory):
        raise Failed(f"--factory {factory}: expected package.module:function")
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        if path.suffix == ".pt2":
            return Source("program", model)
        if path.suffix in _STATES:
            if factory is None:
                raise Failed(
                    f"{model} holds weights alone, and a model is code too: give the function that "
                    f"makes it, --factory package.module:function"
                )
            return Source("factory", model, factory)
        raise Failed(
            f"{model}: a model is a Hugging Face folder, a .pt2 of torch.export, or weights "
            f"({', '.join(_STATES)}) with --factory package.module:function"
        )
    if _NAMED.fullmatch(model):
        return Source("factory", "", model)
    raise Failed(_no_such(path))


def _folder(path: Path) -> Source:
    if (path / ARTIFACT).is_file() or (path / "model.json").is_file():
        raise Failed(f"{path} is quantized already: give the float model that it was made of")
    if (path / "config.json").is_file():
        return Source("folder", str(path))
    held = sorted(each.name for each in path.iterdir())
    found = ", ".join(held[:5]) + (f" and {len(held) - 5} more" if len(held) > 5 else "")
    raise Failed(
        f"{path} is no Hugging Face folder: it has no config.json, but {found or 'nothing'}. Save "
        "a model of transformers there with model.save_pretrained(folder), or give weights and "
        "--factory package.module:function"
    )


def _no_such(path: Path) -> str:
    message = f"there is no file or folder {path}"
    if path.parent.is_dir():
        names = [each.name for each in path.parent.iterdir()]
        if close := difflib.get_close_matches(path.name, names, n=2):
            return f"{message}; did you mean {', '.join(str(path.parent / x) for x in close)}?"
    if path.parent != Path() and not path.is_absolute():
        return (
            f"{message}. Models are read from this disk: hf download {path} --local-dir "
            f"{path.name}, and then give {path.name}"
        )
    return f"{message}; give the path of a Hugging Face folder, of a .pt2, or of weights"


def imported(name: str, given_as: str) -> Any:
    """The object that ``package.module:name`` names; the current folder is looked in too.

    Raises:
        Failed: the module cannot be imported, or has no such name.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == module_name.split(".")[0]
        fix = (
            "run in the folder that has it, or name that folder: PYTHONPATH=folder torch-quant ..."
            if absent
            else f"python -c 'import {module_name}' shows where"
        )
        raise Failed(
            f"{given_as} {name}: cannot import {module_name} ({type(error).__name__}: {error}); "
            f"{fix}"
        ) from error
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            names = [each for each in dir(value) if not each.startswith("_")]
            close = difflib.get_close_matches(part, names) or names[:5]
            raise Failed(f"{given_as} {name}: {module_name} has no {part}; it has {close}")
        value = getattr(value, part)
    return value


def float_model(source: Source) -> nn.Module:
    """The model in float32 and eval mode.

    Raises:
        Failed: it cannot be loaded; says why.
    """
    if source.path and not Path(source.path).exists():
        raise Failed(f"the float model is no longer at {source.path}: put it back, or give --model")
    if source.kind == "folder":
        model = _of_transformers(Path(source.path))
    elif source.kind == "program":
        model = _of_program(Path(source.path))
    else:
        model = _made(source.factory)
        if source.path:
            _give_weights(model, Path(source.path), source.factory)
    return model


def _of_transformers(folder: Path) -> nn.Module:
    needed("transformers", what=f"the Hugging Face folder {folder}")
    import torch
    import transformers

    from torch_quant.graph.progress import hidden

    if hidden():
        transformers.utils.logging.disable_progress_bar()

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            raise Failed(
                f"{folder} is a quantized checkpoint: torch-quant quantizes float ones. "
                "torch_quant.load_checkpoint(folder) runs it as it is"
            )
        names = getattr(config, "architectures", None) or [""]
        found = getattr(transformers, str(names[0]), transformers.AutoModel)
        model, about = found.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Failed:
        raise
    except Exception as error:  # OSError, ValueError and what architectures raise
        first = " ".join(str(error).split())[:300]
        raise Failed(f"{folder}: transformers cannot load it: {first}") from error
    if missing := sorted(about.get("missing_keys", ())):
        raise Failed(
            f"{folder}: its weights lack {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}, which "
            f"{type(model).__name__} has: write the class that the weights are of into "
            '"architectures" of config.json'
        )
    result: nn.Module = model.eval()
    return result


def _of_program(file: Path) -> nn.Module:
    import torch

    check_pickles(file)
    try:
        program = torch.export.load(file)
    except Exception as error:
        raise Failed(f"{file}: torch.export cannot load it: {error}") from error
    module = program.module()
    for name in vars(module):  # checks of sizes, which a quantized model makes by itself
        if name.startswith(("_forward_hooks", "_forward_pre_hooks")):
            vars(module)[name].clear()
    with contextlib.suppress(NotImplementedError):  # exported programs refuse eval()
        module = module.eval()
    return module


def _made(factory: str) -> nn.Module:
    from torch import nn

    function = imported(factory, "--factory")
    try:
        model = function() if not isinstance(function, nn.Module) else function
    except Exception as error:
        raise Failed(f"--factory {factory}() raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise Failed(f"--factory {factory}() gave a {type(model).__name__}; expected an nn.Module")
    return model.eval()


def _give_weights(model: nn.Module, file: Path, factory: str) -> None:
    import torch

    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(str(file))
        else:
            state = torch.load(file, weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise Failed(f"{file}: the weights cannot be read ({type(error).__name__}: {first})") from (
            error
        )
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise Failed(
            f"{file} does not fit the model that {factory} makes: {' '.join(lines)[:400]}"
        ) from error


def skeleton(source: Source, folder: Path) -> nn.Module | None:
    """A model of the source's class for ``torch_quant.load``, which reads no weights of it.

    Args:
        source: where the float model was.
        folder: what the quantized model was saved to, with a copy of its ``config.json``.
    """
    if source.kind == "folder":
        needed("transformers", what=f"the model of {folder}")
        from torch_quant.checkpoints.skeletons import built

        return built(_Described(folder))
    return _made(source.factory) if source.kind == "factory" else None


class _Described:
    """The description of a model of transformers, without its weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise Failed(f"cannot read {folder / 'config.json'}: {error}") from error
