"""Which override holds for a site: of those that cover it, the most specific.

From the most specific to the least:

1. Names and patterns (globs, ``re:``). Of several, that which leads deeper into the model before
   anything is left open, since it covers less: ``"encoder.layer.0.query"``, then
   ``"encoder.layer.0"``, ``"encoder.layer.*.query"``, ``"encoder"``, ``"*.query"``. At one depth, a
   pattern before the plain name of a module, since it covers a part of that.
2. Functions of a :class:`SiteInfo`.
3. Module classes: that of the innermost module, and there the most derived.
4. Op types.

Of equals, the last given holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from torch_quant.config import OverrideKey, Overrides, QConfig, SiteInfo
from torch_quant.core.naming import class_named, did_you_mean, is_pattern, matches_name, plain_depth
from torch_quant.errors import InvalidConfig
from torch_quant.graph.sites import Site, op_name
from torch_quant.ops.table import OPERATORS

__all__ = [
    "Rule",
    "key_text",
    "modules_of",
    "operator_names",
    "qconfig_of",
    "rules_for",
    "rules_of",
]


def operator_names() -> frozenset[str]:
    """Names that a site may have, with a number behind it, in no module but the root."""
    return frozenset(op_name(target) for row in OPERATORS.values() for target in row.targets)


_Rank = tuple[int, int, int]


@dataclass(frozen=True)
class Rule:
    """One override.

    Args:
        key: as the user gave it.
        value: the configuration, None for float.
        kind: ``"name"``, ``"function"``, ``"class"`` or ``"op type"``.
        target: the name or pattern, function, class or op type that the key stands for.
    """

    key: OverrideKey
    value: QConfig | None
    kind: str
    target: object

    def rank(self, site: Site, modules: tuple[nn.Module, ...]) -> _Rank | None:
        """How specific it is for a site, to be compared, or None if it does not cover it.

        Args:
            site: the site.
            modules: the modules it runs in, outermost first.

        Raises:
            InvalidConfig: a function raises, or returns neither True nor False.
        """
        if self.kind == "op type":
            return (0, 0, 0) if site.op == self.target else None
        if self.kind == "name":
            pattern = str(self.target)
            if not matches_name(site.name, pattern):
                return None
            refined = 2 if "@" in pattern else 1 if is_pattern(pattern) else 0
            return (3, plain_depth(pattern), refined)
        if self.kind == "class":
            cls = cast("type[nn.Module]", self.target)
            depths = [i for i, module in enumerate(modules) if isinstance(module, cls)]
            if not depths:
                return None
            return (1, depths[-1], -type(modules[depths[-1]]).__mro__.index(cls))
        return (2, 0, 0) if self._asked(site, modules) else None

    def _asked(self, site: Site, modules: tuple[nn.Module, ...]) -> bool:
        info = SiteInfo(site.name, site.op, modules[-1])
        try:
            answer = self.target(info)  # type: ignore[operator]
        except Exception as error:  # whatever a function of the user's raises
            raise InvalidConfig(
                f"override {key_text(self.key)} fails for the site {site.name}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(answer, bool):
            raise InvalidConfig(
                f"override {key_text(self.key)} returns {answer!r} for the site {site.name}; "
                "expected True or False"
            )
        return answer

    def __str__(self) -> str:
        return f"override {key_text(self.key)}"


def key_text(key: object) -> str:
    """A key as messages show it.

    >>> key_text("encoder.*"), key_text(nn.Linear)
    ("'encoder.*'", 'Linear')
    """
    if isinstance(key, str):
        return repr(key)
    name = getattr(key, "__qualname__", None)
    return repr(key) if name is None else name if isinstance(key, type) else f"{name}()"


def rules_of(overrides: Overrides) -> list[Rule]:
    """The overrides as rules, in the order given.

    Raises:
        InvalidConfig: a key or a value is none; a misspelt op type or class, a wrong expression.
    """
    return [_rule(key, value) for key, value in overrides.items()]


def _rule(key: OverrideKey, value: QConfig | None) -> Rule:
    if value is not None and not isinstance(value, QConfig):
        raise InvalidConfig(f"override {key_text(key)} is {value!r}; expected a QConfig or None")
    if isinstance(key, str):
        return _rule_of_text(key, value)
    if isinstance(key, type):
        if issubclass(key, nn.Module):
            return Rule(key, value, "class", key)
    elif callable(key):
        return Rule(key, value, "function", key)
    raise InvalidConfig(
        f"override {key!r}: expected a name, an op type, a module class or a function of a SiteInfo"
    )


def _rule_of_text(key: str, value: QConfig | None) -> Rule:
    if not key:
        raise InvalidConfig("override '': expected a name, or '*' for everything")
    if key in OPERATORS:
        return Rule(key, value, "op type", key)
    prefix, colon, rest = key.partition(":")
    if not colon or prefix not in ("op", "class", "re", "re?"):
        return Rule(key, value, "name", key)
    if prefix == "op":
        if rest not in OPERATORS:
            hint = did_you_mean(rest, OPERATORS) or f"; expected one of {', '.join(OPERATORS)}"
            raise InvalidConfig(f"override {key!r}: unknown op type {rest!r}{hint}")
        return Rule(key, value, "op type", rest)
    try:
        if prefix == "class":
            return Rule(key, value, "class", class_named(rest))
        matches_name("x", key)  # compiles the expression
    except InvalidConfig as error:
        raise InvalidConfig(f"override {key!r}: {error}") from error
    return Rule(key, value, "name", key)


def modules_of(model: nn.Module, site: Site) -> tuple[nn.Module, ...]:
    """The modules that a site runs in, outermost first."""
    found = [model]
    for part in site.module.split("."):
        child = found[-1]._modules.get(part.partition("@")[0])
        if child is None:
            break
        found.append(child)
    return tuple(found)


def rules_for(site: Site, modules: tuple[nn.Module, ...], overrides: Overrides) -> list[Rule]:
    """The overrides that cover a site, that which holds first."""
    found = [
        ((*rank, index), rule)
        for index, rule in enumerate(rules_of(overrides))
        if (rank := rule.rank(site, modules)) is not None
    ]
    return [rule for _, rule in sorted(found, key=lambda each: each[0], reverse=True)]


def qconfig_of(
    site: Site, modules: tuple[nn.Module, ...], default: QConfig, overrides: Overrides
) -> QConfig | None:
    """The site's configuration, None for float: its most specific override, else ``default``."""
    found = rules_for(site, modules, overrides)
    return found[0].value if found else default
