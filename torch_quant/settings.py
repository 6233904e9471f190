"""What the user asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_quant.config import ObserverLike, Overrides, QConfig
from torch_quant.core.naming import check_names, is_pattern, matches_name, may_be_idle
from torch_quant.errors import InvalidConfig
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
        """Raise :class:`InvalidConfig` for an override of nothing, or what is of another type."""
        rules_of(self.overrides)
        if not isinstance(self.module_filter, ModuleFilter):
            raise InvalidConfig(
                f"module_filter={self.module_filter!r}: expected a ModuleFilter, such as "
                "ModuleFilter(exclude_names=['head']), which leaves the head in float, or "
                "ModuleFilter(include_names=['encoder']), which quantizes nothing else"
            )

    def check_names(
        self, model: nn.Module, sites: Callable[[], Iterable[str]] = tuple[str]
    ) -> None:
        """A misspelt name should not wait for the first batch to be found.

        Args:
            model: the float model.
            sites: the names of sites that are known already. Of others it is known what they may
                be called: after a module and an operator, with a number behind it.

        Raises:
            InvalidConfig: a name or pattern that covers no module, and can cover no site.
        """
        rules = [str(rule.key) for rule in rules_of(self.overrides) if rule.kind == "name"]
        given = [("ModuleFilter name", name) for name in self.module_filter.names]
        given += [("override", key) for key in rules]
        if not given:
            return
        known = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        for what, pattern in given:
            if not may_be_idle(pattern) and not _may_be_site(pattern, known):
                types = OPERATORS if what == "override" else ()
                check_names([pattern], [*known, *sites()], what, types)

    def config_of(self, model: nn.Module, site: Site) -> QConfig | None:
        """The configuration of a site, None if it stays in float."""
        return qconfig_of(site, modules_of(model, site), self.qconfig, self.overrides)


def _may_be_site(pattern: str, modules: list[str]) -> bool:
    """Whether a name or pattern covers a module, or may cover an operator in one."""
    operators = operator_names()
    if not is_pattern(pattern):
        name = re.sub(r"@\d+", "", pattern)
        module, _, operator = name.rpartition(".")
        inside = re.sub(r"_\d+$", "", operator) in operators
        return name in modules or (inside and (not module or module in modules))
    if any(matches_name(name, pattern) for name in modules):
        return True
    if pattern.startswith("re:"):
        if "@" in pattern or any(operator in pattern for operator in operators):
            return True  # of which number is known once there are sites
    else:
        pattern = re.sub(r"(_[\d*?\[\]!-]+)?$", "", re.sub(r"@[\d*?\[\]!-]+", "", pattern))
    sites = (f"{name}.{each}".strip(".") for name in ("", *modules) for each in operators)
    return any(matches_name(site, pattern) for site in sites)


def observer_name(choice: ObserverLike) -> str:
    """The name of an observer that a :class:`QConfig` asks for.

    >>> from torch_quant.statistics import MinMaxObserver
    >>> observer_name("minmax"), observer_name(MinMaxObserver)
    ('minmax', 'minmax')
    """
    if isinstance(choice, str):
        return choice
    return str(getattr(choice, "name", getattr(choice, "__qualname__", repr(choice))))
