"""Models of transformers without the work of giving them weights."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from torch_quant.core.packages import missing_packages
from torch_quant.errors import BackendUnavailable, InvalidConfig

__all__ = [
    "built", "config_of", "listed", "placeholder", "put_tensors", "tensors_of", "tied_names",
]  # fmt: skip


_NOT_READ = (
    "quantization_config", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "experts_implementation", "_experts_implementation",
    "_experts_implementation_internal", "auto_map",
)  # fmt: skip
"""Of config.json: what quantization adds, and what may name code of a repository to be fetched."""


class Description(Protocol):
    """A folder of a model of transformers."""

    folder: Path
    config: dict[str, Any]
    """What its ``config.json`` holds."""


def built(files: Description, *, hollow: bool = False) -> nn.Module:
    """A model of the class and sizes that ``config.json`` names; its weights have no values yet.

    Args:
        files: has it.
        hollow: let parameters be on the meta device. Buffers are not.

    Raises:
        BackendUnavailable: transformers is not installed.
        InvalidConfig: it names no architecture that transformers has.
    """
    if missing := missing_packages("transformers"):
        raise BackendUnavailable(
            f"load_checkpoint without model=: {missing}, or give a model of the checkpoint's class"
        )
    import transformers

    data = {k: v for k, v in files.config.items() if k not in _NOT_READ}
    where = files.folder / "config.json"
    try:
        kind = str(data["model_type"])
        config = transformers.AutoConfig.for_model(**data)
    except (KeyError, ValueError, TypeError, ArithmeticError) as error:
        raise InvalidConfig(f"{where}: its model cannot be built: {error}") from error
    names = data.get("architectures") or ()
    first = names[0] if isinstance(names, (list, tuple)) and names else ""
    cls = getattr(transformers, str(first), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise InvalidConfig(
            f"{where}: transformers {transformers.__version__} has no architecture {names!r} of "
            f"model type {kind!r}; give a model of that class, load_checkpoint(folder, model=...)"
        )
    try:
        with _without_initializing(), _hollow() if hollow else contextlib.nullcontext():
            model: nn.Module = cls._from_config(config, dtype=torch.float32)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError, AttributeError) as error:
        raise InvalidConfig(f"{where}: its model cannot be built: {error}") from error
    model.tie_weights()  # type: ignore[operator]
    generation = files.folder / "generation_config.json"
    if generation.is_file() and hasattr(model, "generation_config"):
        read: Any = transformers.GenerationConfig.from_pretrained(str(files.folder))
        model.generation_config = read
    return model.eval()


@contextlib.contextmanager
def _without_initializing() -> Iterator[None]:
    """Memory that nobody writes to costs nothing; buffers that are computed get their values."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


@contextlib.contextmanager
def _hollow() -> Iterator[None]:
    """Parameters go to the meta device as soon as a module of this thread has them."""
    thread = threading.get_ident()

    def emptied(module: nn.Module, name: str, x: nn.Parameter) -> nn.Parameter | None:
        if x.device.type == "meta" or threading.get_ident() != thread:
            return None
        return nn.Parameter(x.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def placeholder(shape: tuple[int, ...]) -> nn.Parameter:
    """A weight of zeros that takes four bytes, whatever its shape."""
    return nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a checkpoint holds, by each of its names: parameters and buffers.

    Buffers that are computed from the configuration are none of them.
    """
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for name, x in module._buffers.items():
            if x is not None and name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}".strip(".")] = x
    return found


def tied_names(tensors: dict[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Name -> all names of the same tensor."""
    names: dict[int, list[str]] = {}
    for name, x in tensors.items():
        names.setdefault(id(x), []).append(name)
    return {name: tuple(names[id(x)]) for name, x in tensors.items()}


def config_of(model: nn.Module) -> Any:
    """The configuration of a model of transformers.

    Raises:
        InvalidConfig: it has none.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not callable(getattr(config, "to_json_string", None)):
        raise InvalidConfig(
            f"the model has no configuration of transformers (model.config is {config!r}), which "
            "a checkpoint needs; torch_quant.save(model, folder) saves any quantized model"
        )
    return config


def put_tensors(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put tensors into a model by their names."""
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name in held:
                full = f"{path}.{name}".strip(".")
                if full in values:
                    held[name] = values[full]


def listed(names: list[str], what: str) -> list[str]:
    """Nothing, or one phrase: ``lacks a, b, c and 4 more``."""
    if not names:
        return []
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what} {', '.join(names[:3])}{rest}"]
