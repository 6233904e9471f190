"""Names in messages and files: what may have been meant, and classes by their path."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

from torch import nn

from torch_quant.errors import InvalidConfig

__all__ = ["class_named", "class_path", "did_you_mean"]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The closest of ``known`` as the end of a message, empty if none is close.

    >>> did_you_mean("haed", ["conv", "head"])
    '; did you mean head?'
    """
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.4)
    return f"; did you mean {', '.join(close)}?" if close else ""


def class_path(cls: type[nn.Module]) -> str:
    """The path by which :func:`class_named` finds a class.

    Raises:
        InvalidConfig: there is none, since the class was made inside of a function.

    >>> class_path(nn.Linear)
    'torch.nn.Linear'
    """
    if getattr(nn, cls.__name__, None) is cls:
        return f"torch.nn.{cls.__name__}"
    path = f"{cls.__module__}.{cls.__qualname__}"
    try:
        found: type[nn.Module] | None = class_named(path)
    except InvalidConfig:
        found = None
    if found is not cls:
        raise InvalidConfig(
            f"the class {path} cannot be found by its path, so it cannot be written as data: "
            "define it at the top of a module, or name the modules instead"
        )
    return path


def class_named(path: str) -> type[nn.Module]:
    """The module class at ``path``, of a module that is imported already: nothing is imported here.

    Raises:
        InvalidConfig: there is no such class; says up to where the path leads.

    >>> class_named("torch.nn.Linear")
    <class 'torch.nn.modules.linear.Linear'>
    """
    parts = path.split(".")
    ends = (n for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in sys.modules)
    end = next(ends, 0)
    if not end:
        raise InvalidConfig(
            f"no module of the class {path!r} is imported: write the whole path, as in "
            "'torch.nn.Linear', and import the module before; a configuration imports nothing"
        )
    found: object = sys.modules[".".join(parts[:end])]
    for n in range(end, len(parts)):
        holder, found = found, getattr(found, parts[n], None)
        if found is None:
            classes = [k for k, v in vars(holder).items() if isinstance(v, type)]
            hint = did_you_mean(parts[n], classes)
            raise InvalidConfig(f"{'.'.join(parts[:n])} has no class {parts[n]!r}{hint}")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise InvalidConfig(f"{path!r} is no class of torch.nn.Module")
    return found
