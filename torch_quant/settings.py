"""What the user asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_quant.config import ObserverLike, Overrides, QConfig
from torch_quant.core.naming import check_names, is_pattern
from torch_quant.graph.rules import modules_of, operator_names, qconfig_of, rules_of
from torch_quant.graph.sites import Site
from torch_quant.io.summary import Summary
from torch_quant.module_filter import ModuleFilter
from torch_quant.ops.table import OPERATORS

__all__ = ["Settings", "observer_name"]


@dataclass(frozen=True)
class Settings:
    """Configuration of one quantizer.

    Args:
        qconfig: formats and observers where the backend's own should not be used.
        overrides: exceptions to it.
        module_filter: which sites to quantize at all.
        summary: a file that was read; goes before all of these, site by site.
    """

    qconfig: QConfig
    overrides: Overrides
    module_filter: ModuleFilter
    summary: Summary

    def values(self) -> dict[str, Any]:
        """Every setting by name, to be compared later: what may change in place is copied."""
        return {
            "qconfig": self.qconfig,
            "overrides": dict(self.overrides),
            "module_filter": self.module_filter,
            "the summary": self.summary,
        }

    def check(self) -> None:
        """Raise :class:`InvalidConfig` for an override of nothing, or one that is no QConfig."""
        rules_of(self.overrides)

    def check_names(self, model: nn.Module) -> None:
        """A misspelt module name should not wait for the first batch to be found.

        What may name an operator inside a module, or outside of all, is checked once captured.
        """
        known = [name for name, _ in model.named_modules() if name]
        tops = {name.partition(".")[0] for name in known}
        keys = [str(rule.key) for rule in rules_of(self.overrides) if rule.kind == "name"]
        given = [("ModuleFilter name", name) for name in self.module_filter.names]
        given += [("override", key) for key in keys]
        for what, pattern in given:
            operator = re.sub(r"(_\d+)?(@\d+)?$", "", pattern) in operator_names()
            if not (pattern.partition(".")[0] in tops or operator or is_pattern(pattern)):
                check_names([pattern], known, what, OPERATORS if what == "override" else ())

    def config_of(self, model: nn.Module, site: Site) -> QConfig | None:
        """The configuration of a site, None if it stays in float."""
        return qconfig_of(site, modules_of(model, site), self.qconfig, self.overrides)


def observer_name(choice: ObserverLike) -> str:
    """The name of an observer that a :class:`QConfig` asks for.

    >>> from torch_quant.statistics import MinMaxObserver
    >>> observer_name("minmax"), observer_name(MinMaxObserver)
    ('minmax', 'minmax')
    """
    if isinstance(choice, str):
        return choice
    return str(getattr(choice, "name", getattr(choice, "__qualname__", repr(choice))))
