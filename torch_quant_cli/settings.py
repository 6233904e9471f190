"""Options that say what is quantized and how, and the quantizer that they ask for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from torch_quant_cli.exits import Failed

if TYPE_CHECKING:
    from torch_quant import Quantizer

__all__ = ["quantizer_of", "settings_options", "wants_rounding"]

F = TypeVar("F", bound=Callable[..., Any])


def settings_options(function: F) -> F:
    """``--recipe``, its options, ``--config`` and ``--float``."""
    options = (
        click.option("--recipe", help="Formats by name, as int8_static or int4_weight_only."),
        click.option("-o", "--option", "options", multiple=True, metavar="KEY=VALUE",
                     help="An option of the recipe, as group_size=32; may be repeated."),
        click.option("--config", type=click.Path(),
                     help="A quantizer's settings, as YAML or JSON."),
        click.option("--float", "in_float", multiple=True, metavar="NAME",
                     help="A layer, glob or re: that stays in float; may be repeated."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def quantizer_of(given: Mapping[str, Any], **more: Any) -> Quantizer:
    """The quantizer that the options ask for.

    Args:
        given: the options of the command.
        more: further arguments of it, which go before a file's.

    Raises:
        Failed: an option is wrong, or names no file; says which.
    """
    from torch_quant.backends import usable_backend
    from torch_quant.configuration import read_configuration
    from torch_quant.quantizer import Quantizer

    config, recipe, backend = given["config"], given["recipe"], given.get("backend")
    arguments: dict[str, Any] = {}
    if config is not None:
        if not Path(config).is_file():
            raise Failed(f"--config {config}: there is no such file")
        arguments = read_configuration(config)
    pairs = dict(_pair(each) for each in given["options"])
    if pairs and recipe is None:
        raise Failed(f"-o {given['options'][0]} is an option of a recipe: give --recipe too")
    if recipe is not None:
        read = {"qconfig": {"recipe": recipe, **pairs}}
        try:
            arguments["qconfig"] = read_configuration(read)["qconfig"]
        except Exception as error:
            message = str(error).removeprefix("the configuration: ").removeprefix("'qconfig': ")
            raise Failed(f"--recipe {recipe}: {message}") from error
    if backend not in (None, "fastest"):
        arguments["backend"] = usable_backend(backend)
    if given["in_float"]:
        in_float = dict.fromkeys(given["in_float"])
        arguments["overrides"] = {**arguments.get("overrides", {}), **in_float}
    return Quantizer(**arguments | more)


def wants_rounding(quantizer: Quantizer) -> bool:
    """Whether weights alone are rounded, and with data."""
    config = quantizer.qconfig
    methods = [*config.transforms, *([config.method] if config.method is not None else [])]
    return not config.needs_ranges and any(
        each.wants_blocks or each.wants_statistics for each in methods
    )


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise Failed(f"-o {text}: expected KEY=VALUE, as group_size=32")
    if value.lower() in ("true", "false", "none", "null"):
        return name, {"true": True, "false": False}.get(value.lower())
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
