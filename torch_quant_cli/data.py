"""Where inputs come from: arrays, tensors, lines of text, images, or an iterator of the user's."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_quant_cli.exits import Failed
from torch_quant_cli.images import IMAGES, images
from torch_quant_cli.models import imported
from torch_quant_cli.texts import Texts, spans, tokenized

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Reading", "batches", "check_data", "inputs_of", "shapes"]

_MODULE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Reading:
    """How data is read.

    Args:
        samples: how many at most.
        batch_size: how many go into a call; None for 8, and 1 for text, which padding would change.
        tokenizer: a folder with one; None for that of the model.
        length: the most tokens of a text; None for 128, and 512 where a model writes text.
        text_field: of the objects of a ``.jsonl``.
        image_size: of images; None for what the model's folder says.
        cut: samples that no batch holds together with those behind them.
    """

    samples: int = 128
    batch_size: int | None = None
    tokenizer: str | None = None
    length: int | None = None
    text_field: str = "text"
    image_size: int | None = None
    cut: int | None = None


def check_data(data: str) -> None:
    """Raise :class:`Failed` if there is nothing of that name; before anything is loaded."""
    path = Path(data)
    if path.exists() or _MODULE.fullmatch(data):
        if path.is_file() and path.stat().st_size == 0:
            raise Failed(f"--data {data} is empty: give a file with samples")
        return
    raise Failed(
        f"--data {data}: there is no such file or folder. Data is a .npz, a .safetensors, a .jsonl "
        "or text file, a folder of images, or module:iterator"
    )


def batches(data: str, model: nn.Module, folder: Path | None, how: Reading) -> list[Any]:
    """Inputs of ``model``, each as ``calib`` takes them: a dict of keywords, a tuple or a tensor.

    Args:
        data: a path, or ``module:name``.
        model: for the names of its inputs.
        folder: of Hugging Face, with its tokenizer and what it says of images; None without one.
        how: how much, and how.

    Raises:
        Failed: it cannot be read, holds no sample, or does not fit the model.
    """
    check_data(data)
    path = Path(data)
    if not path.exists():
        found = _of_iterator(data, how)
    elif path.is_dir():
        found = _named(
            images(path, folder, how.samples, how.image_size), model, how, "pixel_values"
        )
    elif path.suffix in IMAGES:
        raise Failed(f"--data {data} is one image: give the folder of it")
    elif path.suffix == ".npz":
        found = _arrays(_npz(path), path, model, how)
    elif path.suffix == ".safetensors":
        found = _arrays(_tensors(path), path, model, how)
    elif path.suffix in (".npy", ".pt", ".pth", ".pkl", ".csv", ".parquet"):
        raise Failed(
            f"--data {data}: {path.suffix} is not read; save arrays as .npz (numpy.savez) with the "
            "names of the model's inputs, or write a function that yields inputs: module:function"
        )
    else:
        found = _of_lines(path, model, folder, how)
    if not found:
        raise Failed(f"--data {data} holds no sample")
    return found


def inputs_of(model: nn.Module) -> tuple[list[str], bool]:
    """The names of a model's inputs, and whether it takes any others."""
    parameters = inspect.signature(model.forward).parameters.values()
    open_ = any(each.kind is each.VAR_KEYWORD for each in parameters)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each.name for each in parameters if each.kind in kinds], open_


def check_names(given: Iterable[str], model: nn.Module, where: str, fix: str = "") -> bool:
    """Raise :class:`Failed` where the model has no input of a name that data has.

    Args:
        given: names of arrays.
        model: that they are for.
        where: they stand, for messages.
        fix: what else may be done, instead of writing other arrays.

    Returns:
        Whether they are names; False where the one array is the model's one input, or the model
        says no names, and they stand for positions.
    """
    from torch_quant.core.naming import did_you_mean

    given = list(given)
    names, open_ = inputs_of(model)
    if not names and not open_:
        return False
    passed = _passed_on(model) if open_ else []
    unknown = [name for name in given if name not in names and name not in (passed or ())]
    if not unknown:
        return True
    if len(given) == len(names) == 1 and not open_:
        return False
    free = [name for name in [*names, *(passed or ())] if name not in given]
    if passed is None and not names:
        return True  # nothing says the names
    if passed is None and len(unknown) < len(given):  # what **kwargs takes is not known
        unknown = [name for name in unknown if did_you_mean(name, free, cutoff=0.72)]
        if not unknown:
            return True
    hints = [did_you_mean(name, free, cutoff=0.6) for name in unknown]
    hint = next(filter(None, hints), "; give the arrays the names of inputs.")
    meant = [name for name in free if f"did you mean {name}" in hint] or free or names
    are = "are no inputs" if len(unknown) > 1 else "is no input"
    raise Failed(
        f"{where}: {', '.join(unknown)} {are} of the model{hint} It takes "
        f"{', '.join(names) or 'keywords'}{fix or f': numpy.savez(file, {meant[0]}=...)'}"
    )


def _passed_on(model: nn.Module) -> list[str] | None:
    """The names that ``**kwargs`` of ``forward`` may have; None where nothing says them."""
    for each in inspect.signature(model.forward).parameters.values():
        if each.kind is each.VAR_KEYWORD:
            hint = each.annotation
            if isinstance(hint, str):
                try:
                    hint = typing.get_type_hints(model.forward)[each.name]
                except Exception:  # it names what its module does not have
                    return None
            (held,) = typing.get_args(hint)[:1] or (None,)
            return [*held.__annotations__] if typing.is_typeddict(held) else None
    return None


def shapes(inputs: Any) -> str:
    """Inputs in words, for messages.

    >>> import torch
    >>> shapes({"x": torch.ones(2, 3)})
    'x: float32 [2, 3]'
    """
    from torch import Tensor

    if isinstance(inputs, Mapping):
        return ", ".join(f"{name}: {shapes(each)}" for name, each in inputs.items())
    if isinstance(inputs, (tuple, list)):
        return ", ".join(map(shapes, inputs))
    if isinstance(inputs, Tensor):
        return f"{str(inputs.dtype).removeprefix('torch.')} {list(inputs.shape)}"
    return type(inputs).__name__


def _of_iterator(name: str, how: Reading) -> list[Any]:
    given = imported(name, "--data")
    try:
        made = given() if callable(given) else given
        if not isinstance(made, Iterable):
            kind = type(made).__name__
            raise Failed(f"--data {name} gave a {kind}; expected something that yields inputs")
        return list(itertools.islice(made, how.samples))
    except Failed:
        raise
    except Exception as error:
        raise Failed(f"--data {name} raised {type(error).__name__}: {error}") from error


def _npz(path: Path) -> dict[str, Tensor]:
    import numpy
    import torch

    try:
        with numpy.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    except Exception as error:  # zip files and arrays raise many kinds
        raise Failed(
            f"--data {path} cannot be read ({type(error).__name__}: {error}): expected arrays of "
            "numbers, as numpy.savez writes them"
        ) from error


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(str(path))
        return found
    except Exception as error:
        raise Failed(f"--data {path} cannot be read ({type(error).__name__}: {error})") from error


def _arrays(tensors: dict[str, Tensor], path: Path, model: nn.Module, how: Reading) -> list[Any]:
    """Batches of arrays whose rows are samples."""
    if not tensors:
        raise Failed(f"--data {path} holds no array")
    rows = {name: x.shape[0] if x.dim() else 0 for name, x in tensors.items()}
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{name} has {count}" for name, count in rows.items())
        raise Failed(
            f"--data {path}: every array has a row for each sample, but {counts}: give all of them "
            "the same number of rows"
        )
    count = min(next(iter(rows.values())), how.samples)
    by_name = not all(re.fullmatch(r"arr_\d+", name) for name in tensors)
    if by_name:
        by_name = check_names(tensors, model, f"--data {path}")
    size = how.batch_size or 8
    found: list[Any] = []
    for start, end in spans(count, size, how.cut):
        part = {name: _as_input(x[start:end]) for name, x in tensors.items()}
        found.append(_as_call(part, model) if by_name else tuple(part.values()))
    return found


def _as_call(named: dict[str, Tensor], model: nn.Module) -> Any:
    """Inputs as keywords; of an exported program, as it was exported with."""
    spec = getattr(model, "_in_spec", None)
    if spec is None:
        return named
    keywords = spec.children()[1].context or [] if hasattr(spec, "children") else []
    if set(named) <= set(keywords):
        return named
    return tuple(named[name] for name in inputs_of(model)[0] if name in named)


def _as_input(x: Tensor) -> Tensor:
    """In the types that models take: float32, int64, or bool."""
    import torch

    if x.dtype == torch.bool:
        return x
    return x.float() if x.is_floating_point() else x.long()


def _named(tensors: list[Tensor], model: nn.Module, how: Reading, name: str) -> list[Any]:
    """Batches of samples that are one tensor each, by name where the model has that input."""
    import torch

    known = name in inputs_of(model)[0]
    size = how.batch_size or 8
    stacked = [torch.stack(tensors[i:j]) for i, j in spans(len(tensors), size, how.cut)]
    return [{name: x} if known else x for x in stacked]


def _of_lines(path: Path, model: nn.Module, folder: Path | None, how: Reading) -> list[Any]:
    """Text, or JSON objects a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failed(
            f"--data {path} is no text of UTF-8. Data is a .npz, a .safetensors, a .jsonl or text "
            "file, a folder of images, or module:iterator"
        ) from error
    lines = [line for line in text.split("\n") if line.strip()]
    if path.suffix == ".jsonl":
        objects = [_json(line, number, path) for number, line in enumerate(lines, 1)]
        if objects and isinstance(objects[0], dict) and how.text_field not in objects[0]:
            return [_numbers(each, i, path, model) for i, each in enumerate(objects[: how.samples])]
        lines = [_text_of(each, i, path, how) for i, each in enumerate(objects, 1)]
    if not lines:
        return []
    return tokenized(
        lines,
        Texts(str(path), how.tokenizer, how.length, how.samples, how.batch_size or 1, how.cut),
        model,
        folder,
        inputs_of(model)[0],
    )


def _json(line: str, number: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise Failed(f"--data {path}, line {number}: no JSON: {error}") from error


def _text_of(value: Any, number: int, path: Path, how: Reading) -> str:
    text = value.get(how.text_field) if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise Failed(
            f"--data {path}, line {number}: expected a text, or an object with one under "
            f"{how.text_field!r}; --text-field names another"
        )
    return text


def _numbers(value: Any, number: int, path: Path, model: nn.Module) -> dict[str, Tensor]:
    """A sample whose inputs are lists of numbers."""
    import torch

    names, _ = inputs_of(model)
    where = f"--data {path}, line {number + 1}"
    text = "Text is expected under 'text'; --text-field names another"
    if not isinstance(value, dict) or not value:
        keys = type(value).__name__
        raise Failed(f"{where} has {keys}; the model takes {', '.join(names)}. {text}")
    if not check_names(value, model, where, f". {text}"):
        raise Failed(f"{where} has {', '.join(value)}; the model takes {', '.join(names)}. {text}")
    try:
        return {name: _as_input(torch.tensor([each])) for name, each in value.items()}
    except (TypeError, ValueError) as error:
        raise Failed(f"--data {path}, line {number + 1}: no numbers: {error}") from error
