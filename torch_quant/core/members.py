"""Members of a registry, frozen dataclasses with a name, from data such as JSON has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, cast

from torch_quant.core.naming import did_you_mean
from torch_quant.errors import InvalidConfig

__all__ = ["read_member"]

M = TypeVar("M")


def _fixed(value: Any) -> Any:
    """JSON has lists where an option is a tuple."""
    return tuple(map(_fixed, value)) if isinstance(value, list) else value


def read_member(data: Any, known: Mapping[str, type[M]], what: str) -> M:
    """A member from its name, or from a mapping of that and options.

    Args:
        data: ``"gptq"``, or ``{"name": "gptq", "damping": 0.01}``.
        known: every member by its name; frozen dataclasses.
        what: to call one in messages.

    Raises:
        InvalidConfig: it is unknown, or an option is unknown, missing or wrong.

    >>> from torch_quant import GPTQ
    >>> read_member("gptq", {"gptq": GPTQ}, "weight method") == GPTQ()
    True
    """
    options = dict(data) if isinstance(data, Mapping) else {"name": data}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in known:
        hint = did_you_mean(name, known) if isinstance(name, str) else ""
        given = "has no 'name'" if isinstance(data, Mapping) and name is None else f"is {name!r}"
        raise InvalidConfig(f"the {what} {given}; expected one of {', '.join(sorted(known))}{hint}")
    cls = known[name]
    declared = fields(cast("Any", cls))
    allowed = [each.name for each in declared]
    for key in options:
        if key not in allowed:
            hint = did_you_mean(str(key), allowed)
            expected = ", ".join(allowed) or "no option"
            raise InvalidConfig(f"the {what} {name!r} has {key!r}; expected {expected}{hint}")
    for each in declared:
        required = each.default is MISSING and each.default_factory is MISSING
        if required and each.name not in options:
            raise InvalidConfig(f"the {what} {name!r} lacks {each.name!r}")
    try:
        made = cls(**{key: _fixed(value) for key, value in options.items()})
        hash(made)
        return made
    except TypeError as error:
        raise InvalidConfig(f"the {what} {name!r}: {error}") from error
