"""What the arguments of a quantizer stand for, and which mistakes are made with them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from torch_quant.backends import VARIABLE, Backend, backend_of_environment, usable_backend
from torch_quant.config import RECIPES, OverrideKey, QConfig
from torch_quant.core.naming import did_you_mean
from torch_quant.core.spec import FLOAT
from torch_quant.errors import InvalidConfig
from torch_quant.graph.rules import key_text

__all__ = [
    "FASTEST",
    "Choice",
    "check_keywords",
    "check_positions",
    "chosen_backend",
    "override",
    "overrides_of",
    "told",
]

FASTEST = "fastest"
"""Stands for the backend that is measured to be the fastest, where there are inputs."""
Choice = QConfig | str
"""A configuration, or the name of the recipe that gives it."""

logger = logging.getLogger("torch_quant")
_MODEL = "given to calib and quantize, as in Quantizer().calib(model)"


def told(
    choice: Backend | QConfig | str | None, backend: Backend | str | None, qconfig: Choice | None
) -> tuple[Backend | str | None, QConfig | None]:
    """The backend and the configuration, of which one may have been given by position.

    Args:
        choice: what was given by position: either.
        backend: what was given by keyword.
        qconfig: the same.

    Raises:
        InvalidConfig: one of them is given twice, or is neither; says what it should be.

    >>> told("int8_dynamic", "onednn", None)[1] == RECIPES["int8_dynamic"]()
    True
    """
    if choice is None:
        return backend, _qconfig(qconfig)
    if isinstance(choice, nn.Module):
        raise InvalidConfig(f"Quantizer({type(choice).__name__}(...)): a model is {_MODEL}")
    configures = isinstance(choice, QConfig) or _is_function(choice)
    if isinstance(choice, str) and not _is_backend(choice):
        configures = bool(choice in RECIPES or did_you_mean(choice, RECIPES, cutoff=0.7))
    name, other = ("qconfig", qconfig) if configures else ("backend", backend)
    if other is not None:
        raise InvalidConfig(
            f"Quantizer({choice!r}, {name}={other!r}) gives {name} twice: leave one of them out"
        )
    if not configures:
        return choice, _qconfig(qconfig)  # type: ignore[return-value] # no QConfig
    return backend, _qconfig(choice)


def _is_backend(name: str) -> bool:
    try:
        Backend.get(name)
    except InvalidConfig:
        return False
    return True


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, Backend)


def _qconfig(value: object) -> QConfig | None:
    if value is None or isinstance(value, QConfig):
        return value
    if value in RECIPES.values():
        name = getattr(value, "__name__", "")
        raise InvalidConfig(
            f"the recipe {name} is a function, which gives a QConfig: call it, as in "
            f"Quantizer(recipes.{name}())"
        )
    if not isinstance(value, str):
        raise InvalidConfig(
            f"qconfig={value!r}: expected a QConfig, such as a recipe gives: "
            "Quantizer(recipes.int8_dynamic())"
        )
    return _recipe(value)


def _recipe(name: str) -> QConfig:
    if name not in RECIPES:
        raise InvalidConfig(
            f"there is no recipe {name!r}; expected one of {', '.join(RECIPES)}"
            f"{did_you_mean(name, RECIPES)}"
        )
    return RECIPES[name]()


def override(key: OverrideKey, value: object) -> QConfig | None:
    """What an override gives: a QConfig, or None for float.

    Args:
        key: what it covers, for messages.
        value: a QConfig or the name of a recipe; ``"float"``, ``FLOAT`` or None for float.

    Raises:
        InvalidConfig: it is none of these.

    >>> override("head", "float"), override("head", None)
    (None, None)
    """
    if value is None or value is FLOAT or value == str(FLOAT):
        return None
    if isinstance(value, QConfig):
        return value
    if isinstance(value, str) and value in RECIPES:
        return RECIPES[value]()
    hint = did_you_mean(value, ["float", *RECIPES]) if isinstance(value, str) else ""
    if value in RECIPES.values():
        hint = f": call the recipe, recipes.{getattr(value, '__name__', '')}()"
    raise InvalidConfig(
        f"override {key_text(key)} is {value!r}; expected a QConfig or None, 'float' or the name "
        f"of a recipe{hint}"
    )


def overrides_of(given: object) -> dict[OverrideKey, QConfig | None]:
    """The overrides that a user has given, each as :func:`override` reads it.

    Raises:
        InvalidConfig: they are no mapping, or one has no such value.

    >>> overrides_of({"head": "float"})
    {'head': None}
    """
    if not isinstance(given, Mapping):
        raise InvalidConfig(
            f"overrides={given!r}: expected a dict of what is covered and how it is quantized: "
            "overrides={'head': None} leaves the head in float"
        )
    return {key: override(key, value) for key, value in given.items()}


def check_positions(choice: object, more: Sequence[object]) -> None:
    """Raise :class:`InvalidConfig` if more than one argument was given by position.

    Args:
        choice: the first.
        more: the others.

    >>> check_positions("disc", ())
    """
    if not more:
        return
    given = ", ".join(map(repr, (choice, *more)))
    first, second = ("backend", "qconfig")
    try:
        told(choice, None, more[0])  # type: ignore[arg-type] # which of them is the backend
    except InvalidConfig:
        first, second = second, first
    raise InvalidConfig(
        f"Quantizer({given}): one argument may be given by position, a backend or a configuration: "
        f"Quantizer({first}={choice!r}, {second}={more[0]!r})"
    )


def check_keywords(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidConfig` for keywords that no quantizer takes, with the right ones.

    Args:
        given: the unknown ones.
        known: those there are.
    """
    for name in given:
        hint = did_you_mean(name, known)
        if name in ("recipe", "recipes", "config"):
            hint = "; a recipe is given as qconfig, or first: Quantizer(recipes.int8_dynamic())"
        elif name in ("model", "module"):
            hint = f"; it is {_MODEL}"
        raise InvalidConfig(f"Quantizer() takes no {name}={hint}")


def chosen_backend(
    backend: Backend | str | None,
) -> tuple[Backend | None, Backend, Backend | None]:
    """The backend asked for, the one to take, and the same again if the environment forces it.

    Raises:
        InvalidConfig: there is no such backend.
        BackendUnavailable: it does not run on this machine.
    """
    if backend == FASTEST:
        raise InvalidConfig(
            'backend="fastest" is measured on a model and its inputs: quantizer.quantize(model, '
            'backend="fastest", example_inputs=...)'
        )
    asked = None if backend is None else Backend.get(backend)
    forced = backend_of_environment()
    if forced is None or (asked is not None and asked.name == forced.name):
        return asked, usable_backend(asked), None
    if asked is not None:
        logger.warning(
            "%r in the place of %r: the environment variable %s is set", forced, asked, VARIABLE
        )
    return asked, forced, forced
