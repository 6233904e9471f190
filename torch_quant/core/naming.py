"""Names: what a pattern covers, what may have been meant, and classes by their path."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
import sys
from collections.abc import Iterable, Iterator

from torch import nn

from torch_quant.errors import InvalidConfig

__all__ = [
    "check_names",
    "class_named",
    "class_path",
    "did_you_mean",
    "is_pattern",
    "matches_name",
    "may_be_idle",
    "numbered",
    "plain_depth",
]


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """The closest of ``known`` as the end of a message, empty if none is close.

    Args:
        name: what was given.
        known: what there is.
        cutoff: how close, 0 to 1.

    >>> did_you_mean("haed", ["conv", "head"])
    '; did you mean head?'
    """
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=cutoff)
    return f"; did you mean {', '.join(close)}?" if close else ""


def numbered(name: str) -> Iterator[str]:
    """``name``, and then it with numbers: what to try where names may be taken.

    >>> [each for each, _ in zip(numbered("weight"), range(3))]
    ['weight', 'weight_1', 'weight_2']
    """
    return itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))


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


def matches_name(name: str, pattern: str) -> bool:
    """Whether ``pattern`` covers ``name``: the site, a later call of it, or a module above it.

    >>> matches_name("encoder.layer.0.query", "encoder.layer.*")
    True
    >>> matches_name("encoder.layer.0.query", r"re:encoder.layer.[12]")
    False
    """
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        prefix = ".".join(parts[:end])
        if _matches(prefix, pattern):
            return True
        if "@" in prefix and _matches(_without_calls(prefix), pattern):
            return True
    return False


def plain_depth(pattern: str) -> int:
    """How many modules deep a name or pattern leads before anything in it is left open.

    Of a pattern, the last part counts as open, so that a whole name leads deeper.

    >>> plain_depth("encoder.layer.0"), plain_depth("encoder.layer.*"), plain_depth("*.query")
    (3, 2, 0)
    >>> plain_depth(r"re:encoder\\.layer\\.[12]\\.query")
    2
    """
    if not is_pattern(pattern):
        return pattern.count(".") + 1
    expression = _expression(pattern)
    parts = pattern.split(".") if expression is None else expression.split("\\.")
    plain = re.compile(r"[^*?\[]+" if expression is None else r"[\w-]+")
    opened = (i for i, part in enumerate(parts[:-1]) if not plain.fullmatch(part))
    return next(opened, len(parts) - 1)


def is_pattern(text: str) -> bool:
    """Whether a name is a glob or a regular expression."""
    return _expression(text) is not None or any(mark in text for mark in "*?[")


def may_be_idle(pattern: str) -> bool:
    """Whether a pattern says of itself that it may match nothing, as ``re?:`` does.

    >>> may_be_idle("re?:.*lm_head"), may_be_idle("re:.*lm_head")
    (True, False)
    """
    return pattern.startswith("re?:")


def _expression(pattern: str) -> str | None:
    """The regular expression that a pattern is, None for a name or a glob."""
    prefix = next((each for each in ("re:", "re?:") if pattern.startswith(each)), None)
    return None if prefix is None else pattern[len(prefix) :]


def _matches(name: str, pattern: str) -> bool:
    expression = _expression(pattern)
    if expression is not None:
        try:
            return re.fullmatch(expression, name) is not None
        except re.error as error:
            raise InvalidConfig(
                f"{pattern!r} is no regular expression of Python: {error}"
            ) from error
    return fnmatch.fnmatchcase(name, pattern)


def _without_calls(name: str) -> str:
    return ".".join(part.partition("@")[0] for part in name.split("."))


def check_names(
    patterns: Iterable[str], known: Iterable[str], what: str, others: Iterable[str] = ()
) -> None:
    """Raise :class:`InvalidConfig` with the closest matches for a pattern that covers nothing.

    Args:
        patterns: names, globs and regular expressions.
        known: what they may cover.
        what: what they are, for the message.
        others: op types, which may have been meant as well.
    """
    known = list(dict.fromkeys(known))
    for pattern in patterns:
        if not may_be_idle(pattern) and not any(matches_name(name, pattern) for name in known):
            hint = _meant(pattern.removeprefix("re:"), known, others)
            raise InvalidConfig(f"{what} {pattern!r} matches nothing in the model{hint}")


def _meant(name: str, known: list[str], op_types: Iterable[str]) -> str:
    """As :func:`did_you_mean`, with op types called so; what has a dot is no op type."""
    types = [] if "." in name else difflib.get_close_matches(name, list(op_types), n=1)
    if not types:
        return did_you_mean(name, known)
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join([*close, ''])}{'or ' * bool(close)}the op type {types[0]}?"
