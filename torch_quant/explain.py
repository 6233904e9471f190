"""Why a site is quantized as it is: which setting decided what, and what the backend made of it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, fields

from torch_quant import recipes
from torch_quant.algorithms import DEFAULT_METHOD
from torch_quant.backends import Backend
from torch_quant.config import QConfig
from torch_quant.core.methods import Method, Transform, WeightMethod
from torch_quant.core.naming import did_you_mean, matches_name
from torch_quant.core.plan import FALLEN_BACK, LOWER, SLOWER, SitePlan
from torch_quant.core.spec import FLOAT, FloatFormat, QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.graph.annotate import method_refusal
from torch_quant.graph.rules import modules_of, rules_for
from torch_quant.graph.sites import Site
from torch_quant.session import Session
from torch_quant.settings import observer_name
from torch_quant.statistics import DEFAULT_OBSERVER

__all__ = ["Decision", "Explanation", "explain"]

_QCONFIG = "Quantizer(qconfig=...)"
_DEFAULT = "the default"
_VALUE, _RULE, _WIDTH = 16, 45, 78
"""Where the columns of a report begin, and where they end."""


@dataclass(frozen=True)
class Decision:
    """One thing that was decided about a site.

    Args:
        what: ``"quantized"``, ``"input"``, ``"weight"``, ``"observer"`` or ``"method"``, as in
            :class:`QConfig`, or the name of a transform.
        value: what it is now.
        rule: the setting that decided, or the backend.
        why: what else is to be known, empty if nothing.
    """

    what: str
    value: QuantSpec | Method | str | bool | None
    rule: str
    why: str = ""

    def __str__(self) -> str:
        """In columns that 80 characters hold; what is longer goes to lines of its own."""
        words = {"True": "yes", "False": "no", "None": "left out"}
        value = words.get(str(self.value)) or _brief(self.value)
        indent = " " * _VALUE
        if len(value) + _VALUE < _RULE:
            lines = [f"{self.what:<{_VALUE}}{value:<{_RULE - _VALUE}}{self.rule}"]
        else:
            first = textwrap.wrap(value, _WIDTH, initial_indent=f"{self.what:<{_VALUE}}",
                                  subsequent_indent=indent)  # fmt: skip
            lines = [*first, f"{indent}{self.rule}"]
        if self.why:
            lines += textwrap.wrap(self.why, _WIDTH, initial_indent=indent,
                                   subsequent_indent=indent, break_on_hyphens=False)  # fmt: skip
        return "\n  ".join(lines)


def _brief(value: QuantSpec | Method | str | bool | None) -> str:
    """A value in words, without those options of a method that are the default."""
    if not isinstance(value, Method):
        return str(value)
    options = [
        f"{each.name}={getattr(value, each.name)!r}"
        for each in fields(value)
        if each.default != getattr(value, each.name)
    ]
    return f"{value.name}({', '.join(options)})" if options else value.name


@dataclass(frozen=True, repr=False)
class Explanation:
    """What ``Quantizer.explain`` returns; its repr is to be read.

    Args:
        site: the site, or an operator that is none.
        op: its op type.
        backend: for which backend.
        quantized: whether it runs quantized.
        precision: the arithmetic it runs in otherwise.
        reason: why it stays in float, empty if quantized.
        decisions: who decided what.
        overrides: the overrides that cover it; the first holds.
        format: what its numbers are if it is quantized.
    """

    site: str
    op: str
    backend: str
    quantized: bool
    precision: str
    reason: str
    decisions: tuple[Decision, ...]
    overrides: tuple[str, ...] = ()
    format: str = "int8"

    def __getitem__(self, what: str) -> Decision:
        """The decision about ``what``; raises :class:`InvalidConfig` listing those there are."""
        for decision in self.decisions:
            if decision.what == what:
                return decision
        known = ", ".join(decision.what for decision in self.decisions)
        raise InvalidConfig(f"nothing was decided about {what!r} of {self.site}; only {known}")

    def __repr__(self) -> str:
        state = self.format if self.quantized else f"{self.precision}, {self.reason}"
        lines = [f"{self.site} ({self.op}) on {self.backend}: {state}"]
        lines += [f"  {decision}" for decision in self.decisions]
        if self.overrides:
            covering = f"overrides that cover it, the first holds: {', '.join(self.overrides)}"
            lines += textwrap.wrap(covering, _WIDTH, initial_indent="  ", subsequent_indent="    ")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Facts:
    """All that decides about one site."""

    session: Session
    backend: Backend
    site: Site
    obstacle: str
    entry: SitePlan

    @property
    def name(self) -> str:
        return repr(self.backend)

    def decisions(self) -> tuple[Decision, ...]:
        module = self.session.captured.root.module
        modules = modules_of(module, self.site)
        rules = rules_for(self.site, modules, self.session.settings.overrides)
        config = rules[0].value if rules else self.session.settings.qconfig
        source = str(rules[0]) if rules else _QCONFIG
        if not rules and config == recipes.int8_static():
            source = _DEFAULT
        found: list[Decision | None] = []
        told = self.entry.reason == LOWER or (rules and config is None)
        found.append(quantized := self._quantized(source if told else None))
        if not self.entry.quantized and quantized.rule != self.name:
            return (quantized,)  # no format was considered
        edit = self.session.settings.summary.plan.get(self.site.name)
        if config is None and not (edit is not None and edit.quantized):
            return tuple(each for each in found if each is not None)
        config = config or QConfig()
        if edit is not None and edit.quantized:
            found += [self._summary(what) for what in ("input", "weight")]
            found += [Decision(each.name, each, "the summary") for each in self.entry.transforms]
            asked, source = self.entry.method, "the summary"
        else:
            found += [self._format("input", config.input, source)]
            found += [self._format("weight", config.weight, source)]
            found += [self._transform(each, source) for each in config.transforms]
            asked = config.method
        if self.site.inputs and (self.entry.needs_ranges or not self.entry.quantized):
            found.append(self._observer(self.site.inputs[0]))
        if self.site.weight_shape and not isinstance(config.weight, FloatFormat):
            found.append(self._method(asked, source))
        return tuple(each for each in found if each is not None)

    def _quantized(self, override: str | None) -> Decision:
        entry, site = self.entry, self.site
        slower = entry.reason.startswith(SLOWER)
        verdict = self.session.settings.module_filter.verdict(
            site.name, site.op, modules_of(self.session.captured.root.module, site)
        )
        edit = self.session.settings.summary.plan.get(site.name)
        if entry.quantized:
            rule = f"module_filter, {verdict[1]}" if verdict[1] else self.name
            return Decision("quantized", True, rule, self._kernel())
        rule = self.name
        if edit is not None and not edit.quantized:
            rule = "the summary"
        elif self.obstacle:
            rule = "the model"
        elif verdict[0]:
            rule = f"module_filter, {verdict[1]}"
        elif slower:
            rule = "quantize(never_slower=True)"
        elif override:
            rule = override
        elif entry.reason == FALLEN_BACK and site.name in self.session.owner.fallen_back:
            rule = "quantizer.fallback()"
        return Decision("quantized", False, rule, entry.reason)

    def _kernel(self) -> str:
        """What runs the site, and what is to be known of it."""
        activation = self.entry.activation or (FLOAT if self.site.inputs else None)
        weight = self.entry.weight or (FLOAT if self.site.weight_shape else None)
        kernel, _ = self.backend.kernels().choose(self.site.op, activation, weight)
        note = f"; {kernel.note}" if kernel is not None and kernel.note else ""
        return f"it has a kernel for {self.site.op}{note}"

    def _value(self, what: str) -> QuantSpec | str | None:
        """The format of a tensor, None where the site has none."""
        entry, site = self.entry, self.site
        if what == "input":
            return entry.activation or (str(FLOAT) if site.inputs else None)
        return entry.weight or (str(FLOAT) if site.weight_shape else None)

    def _format(
        self, what: str, asked: QuantSpec | FloatFormat | None, source: str
    ) -> Decision | None:
        value = self._value(what)
        if value is None or asked is not None:
            return None if value is None else Decision(what, value, source)
        return Decision(what, value, self.name, f"its format for {self.site.op}")

    def _summary(self, what: str) -> Decision | None:
        value = self._value(what)
        return None if value is None else Decision(what, value, "the summary")

    def _transform(self, transform: Transform, source: str) -> Decision:
        if refusal := transform.refusal(self.site):
            return Decision(transform.name, None, self.site.op, refusal)
        if not transform.optional:
            return Decision(transform.name, transform, source)
        kept = [each for each in self.entry.transforms if each.name == transform.name]
        if kept:
            return Decision(transform.name, kept[0], source)
        return Decision(transform.name, None, source, transform.condition)

    def _method(self, asked: WeightMethod | None, source: str) -> Decision:
        if asked is None:
            return Decision("method", DEFAULT_METHOD, _DEFAULT)
        if refusal := method_refusal(asked, self.site):
            used = asked.elsewhere or DEFAULT_METHOD
            return Decision("method", used, self.site.op, f"{asked}: {refusal}")
        return Decision("method", asked, source)

    def _observer(self, key: str) -> Decision:
        """That of the first input: sites that share a tensor have one observer."""
        first, config = self.session.observed_by(key)
        rules = rules_for(
            first,
            modules_of(self.session.captured.root.module, first),
            self.session.settings.overrides,
        )
        asked = config.observer if config is not None else None
        rule = _DEFAULT if asked is None else str(rules[0]) if rules else _QCONFIG
        why = (
            []
            if first.name == self.site.name
            else [f"decided at {first.name}, which shares the tensor"]
        )
        wanted = observer_name(asked or DEFAULT_OBSERVER)
        recorded = self.session.state.find(key)
        if recorded is None:
            return Decision("observer", wanted, rule, "; ".join([*why, "nothing recorded yet"]))
        if recorded.name != wanted:
            why.append(f"ranges are there already, and {wanted} was asked for")
        return Decision("observer", recorded.name, rule, "; ".join(why))


def explain(session: Session, backend: Backend, name: str) -> Explanation:
    """Who decided what about the site called ``name``.

    Args:
        session: the quantizer and the model.
        backend: where it will run.
        name: the site, or an operator that is none.

    Raises:
        InvalidConfig: there is no such site; names those of a module, or the closest.
    """
    plan, captured = session.plan(backend), session.captured
    for site, obstacle in captured.sites():
        if site.name == name:
            facts = _Facts(session, backend, site, obstacle, plan[name])
            entry, modules = plan[name], modules_of(captured.root.module, site)
            return Explanation(
                name,
                site.op,
                repr(backend),
                entry.quantized,
                entry.precision,
                entry.reason,
                facts.decisions(),
                tuple(str(r)[9:] for r in rules_for(site, modules, session.settings.overrides)),
                entry.format,
            )
    for op in plan.float_ops:
        if op.name == name:
            decision = Decision("quantized", False, "the op table", op.reason)
            return Explanation(name, op.op, repr(backend), False, "float32", op.reason, (decision,))
    inside = [each for each in plan if matches_name(each, name)]
    if inside:
        rest = f" and {len(inside) - 8} more" if len(inside) > 8 else ""
        raise InvalidConfig(
            f"{name!r} is no site but covers {', '.join(inside[:8])}{rest}: explain one of them"
        )
    hint = did_you_mean(name, [*plan, *(op.name for op in plan.float_ops)])
    raise InvalidConfig(f"the model has no site {name!r}{hint}")
