"""From sites and wishes to the plan: which sites are quantized, in which formats, and why not."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from torch import nn

from torch_quant.config import Overrides, QConfig
from torch_quant.core.granularity import PerGroup
from torch_quant.core.kernels import Accepts, Format, Kernel, KernelTable
from torch_quant.core.methods import Transform, WeightMethod
from torch_quant.core.naming import check_names
from torch_quant.core.plan import LOWER, PRECISIONS, QuantPlan, SitePlan
from torch_quant.core.spec import BFLOAT16, FLOAT, QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.graph.routers import is_router
from torch_quant.graph.rules import modules_of, rules_for, rules_of
from torch_quant.graph.sites import Site
from torch_quant.module_filter import ModuleFilter
from torch_quant.ops.table import OPERATORS

__all__ = [
    "annotate",
    "method_refusal",
    "tell_misfits",
    "tell_refused",
    "tell_tied",
    "weight_readers",
]

logger = logging.getLogger("torch_quant")

_LARGE = 2**16
"""Numbers of a weight of which a second copy is told."""
_ROUTER = "it picks experts, and a small error may send a token to others; an override quantizes it"


def annotate(
    sites: Sequence[tuple[Site, str]],
    model: nn.Module,
    kernels: KernelTable,
    *,
    qconfig: QConfig,
    overrides: Overrides,
    module_filter: ModuleFilter,
) -> QuantPlan:
    """Decide for every site.

    Args:
        sites: each with the reason why its graph does not allow int8, empty if it does.
        model: the float model, for its classes.
        kernels: what the backend can run.
        qconfig: the default configuration.
        overrides: exceptions to it.
        module_filter: which sites the user wants at all.

    Raises:
        InvalidConfig: a name or op type that matches nothing.
    """
    _check(sites, model, overrides, module_filter)
    plan = []
    for site, obstacle in sites:
        modules = modules_of(model, site)
        rules = rules_for(site, modules, overrides)
        config = rules[0].value if rules else qconfig
        activation = weight = kernel = None
        precision = PRECISIONS[0]
        reason = obstacle or module_filter.refusal(site.name, site.op, modules) or ""
        if config is None:
            reason = reason or "left in float by an override"
        elif config.input is BFLOAT16:
            precision = precision if reason else str(BFLOAT16)
            reason = reason or LOWER
        else:
            activation, weight, kernel, refusal = _fitting(site, config, kernels)
            reason = reason or refusal
            reason = reason or _misfit(site, activation, weight)
            if kernel is not None and kernel.own_result and not site.result:
                reason = reason or "its result, which the kernel quantizes, is written to in place"
            if not (reason or rules or config.needs_ranges) and is_router(site, modules):
                reason = _ROUTER
        plan.append(
            SitePlan(
                name=site.name,
                op=site.op,
                inputs=(*site.inputs, *site.internals),
                activation=activation,
                weight=weight,
                quantized=not reason,
                reason=reason,
                macs=site.macs,
                precision=precision,
                quantized_output=_quantized_output(site, kernel, activation),
                transforms=() if config is None else _serving(config, site, kernel),
                method=None if config is None or weight is None else _method(config, site),
            )
        )
    return QuantPlan(plan)


def _fitting(
    site: Site, config: QConfig, kernels: KernelTable
) -> tuple[QuantSpec | None, QuantSpec | None, Kernel | None, str]:
    """The formats of a site and the kernel that takes them, or None and why there is none.

    Each kernel is asked with its own formats where the user wants none in particular.
    """
    rows = kernels.of(site.op) or (kernels.hypothetical(site.op),)
    found: list[tuple[QuantSpec | None, QuantSpec | None, Kernel | None, str]] = []
    for row in rows:
        activation = weight = None
        if site.inputs or row.output:
            activation = _format(config.input, row.activation)
        if site.weight_shape:
            weight = _format(config.weight, row.weight)
        chosen, reason = kernels.choose(site.op, activation, weight)
        of_x, of_w = (x if isinstance(x, QuantSpec) else None for x in (activation, weight))
        if chosen is not None and of_x is None and of_w is None:
            chosen, reason = None, "the configuration leaves all that it multiplies in float"
        found.append((of_x, of_w, chosen, reason))
        if chosen is not None:
            return found[-1]
    return found[0]


def _format(asked: Format | None, accepts: Accepts | None) -> Format:
    """What a tensor gets of a kernel."""
    if asked is not None:
        return asked
    return FLOAT if accepts is None else accepts.default


def _quantized_output(site: Site, kernel: Kernel | None, activation: QuantSpec | None) -> str:
    """Key of the result of a site, if that is quantized too."""
    if kernel is None or kernel.output is None or activation is None or activation.dynamic:
        return ""
    return site.result if kernel.own_result else site.fused_output


def _serving(config: QConfig, site: Site, kernel: Kernel | None) -> tuple[Transform, ...]:
    able = kernel is not None and kernel.row_scales
    transforms = (each for each in config.transforms if able or not each.row_scales)
    return tuple(each for each in transforms if not each.refusal(site))


def _method(config: QConfig, site: Site) -> WeightMethod | None:
    if config.method is None or not method_refusal(config.method, site):
        return config.method
    return config.method.elsewhere


def method_refusal(method: WeightMethod, site: Site) -> str:
    """Why a weight method does not serve a site, empty if it does."""
    if method.wants_statistics and OPERATORS[site.op].quantize is not None:
        return f"the matrices of an {site.op} are quantized together, for inputs of several kinds"
    return method.refusal(site)


def _misfit(site: Site, activation: QuantSpec | None, weight: QuantSpec | None) -> str:
    """Why a tensor cannot be cut into the blocks of its format, empty if all can."""
    try:
        if activation is not None and isinstance(activation.granularity, PerGroup):
            activation.granularity.grid(site.weight_shape)  # the same last dimension
        if weight is not None and not (weight.per_tensor or weight.per_channel):
            weight.granularity.on(OPERATORS[site.op].weight_axis).grid(site.weight_shape)
    except InvalidConfig as error:
        return str(error)
    return ""


def tell_misfits(sites: Sequence[tuple[Site, str]], plan: QuantPlan) -> None:
    """Log a warning of sites that stay in float since their groups do not divide the tensor.

    Args:
        sites: as :func:`annotate` takes them.
        plan: what it gave.
    """
    entries = {site.name: (site, plan[site.name]) for site, _ in sites if site.name in plan}
    found = {
        name: entry.reason
        for name, (site, entry) in entries.items()
        if entry.reason and entry.reason == _misfit(site, entry.activation, entry.weight)
    }
    if found:
        (name, reason), *others = found.items()
        rest = f", and {len(others)} more" if others else ""
        logger.warning("stays in float: %s (%s)%s", name, reason, rest)


def tell_refused(
    sites: Sequence[tuple[Site, str]],
    model: nn.Module,
    plan: QuantPlan,
    *,
    qconfig: QConfig,
    overrides: Overrides,
) -> None:
    """Log a warning of weights that the method asked for refuses, and what rounds them.

    Args:
        sites: as :func:`annotate` takes them.
        model: likewise.
        plan: what it gave.
        qconfig: as there.
        overrides: as there.
    """
    found: dict[str, list[str]] = {}
    for site, _ in sites:
        entry = plan.get(site.name)
        if entry is None or not entry.quantized or entry.weight is None:
            continue
        rules = rules_for(site, modules_of(model, site), overrides)
        config = rules[0].value if rules else qconfig
        asked = None if config is None else config.method
        if asked is not None and (reason := method_refusal(asked, site)):
            by = f"{entry.method or 'rtn'}, as {asked.name} refuses them ({reason})"
            found.setdefault(by, []).append(site.name)
    for by, names in found.items():
        names = list(dict.fromkeys(names))
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        logger.warning("rounded by %s: %s%s", by, ", ".join(names[:3]), rest)


def weight_readers(sites: Iterable[Site], model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Parameter -> the sites whose modules hold it as their weight.

    Args:
        sites: some of the model.
        model: the float model.

    >>> from torch_quant.graph.sites import Site
    >>> site = Site("0", "linear", "0", ("x",), (), "0", 4, (2, 2))
    >>> [names for _, names in weight_readers([site], nn.Sequential(nn.Linear(2, 2))).items()]
    [['0']]
    """
    readers: dict[nn.Parameter, list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for site in sites:
        weight = getattr(modules.get(site.module), "weight", None)
        if isinstance(weight, nn.Parameter):
            names = readers.setdefault(weight, [])
            names += [site.name] if site.name not in names else []
    return readers


def _wish(entry: SitePlan) -> str:
    by = entry.method.name if entry.method else "rtn"
    return f"{entry.weight} by {by}" if entry.quantized and entry.weight else "float"


def tell_tied(sites: Sequence[tuple[Site, str]], model: nn.Module, plan: QuantPlan) -> None:
    """Log a warning of large weights that sites share and that are kept once for each.

    Sites of one weight share its integers where format and method are the same.

    Args:
        sites: as :func:`annotate` takes them.
        model: likewise.
        plan: what it gave.
    """
    for weight, names in weight_readers((site for site, _ in sites), model).items():
        wishes = {name: _wish(plan[name]) for name in names if name in plan}
        if len(set(wishes.values())) > 1 and weight.numel() >= _LARGE:
            logger.warning(
                "%s share a weight of %s numbers and are to have it in different ways, so that it "
                "is kept once for each: %s; overrides that give them one format and method keep "
                "it once",
                " and ".join(wishes),
                f"{weight.numel():,}",
                "; ".join(f"{name} {wish}" for name, wish in wishes.items()),
            )


def _check(
    sites: Sequence[tuple[Site, str]],
    model: nn.Module,
    overrides: Overrides,
    module_filter: ModuleFilter,
) -> None:
    names = [site.name for site, _ in sites]
    known = [*names, *(name for name, _ in model.named_modules() if name)]
    rules = rules_of(overrides)
    check_names(module_filter.names, known, "ModuleFilter name")
    check_names(
        [str(rule.key) for rule in rules if rule.kind == "name"], known, "override", OPERATORS
    )
    for rule in rules:
        if rule.kind == "op type" and rule.key in known:
            key = str(rule.key)
            raise InvalidConfig(
                f"override {key!r} is both an op type and a module of the model; write "
                f"{'[' + key[0] + ']' + key[1:]!r} for the module, or {'op:' + key!r} for the op"
            )
    for op in module_filter.op_types:
        if op not in OPERATORS:
            raise InvalidConfig(f"unknown op type {op!r}; expected one of {', '.join(OPERATORS)}")
