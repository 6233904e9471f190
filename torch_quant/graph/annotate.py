"""From sites and wishes to the plan: which sites are quantized, in which formats, and why not."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from torch_quant.config import ModuleFilter, Overrides, QConfig, check_names, matches_name
from torch_quant.core.plan import Placement, QuantPlan, SitePlan
from torch_quant.errors import InvalidConfig
from torch_quant.graph.ops import PATTERNS
from torch_quant.graph.sites import Site

__all__ = ["annotate", "modules_of", "qconfig_of"]


def modules_of(model: nn.Module, site: Site) -> tuple[nn.Module, ...]:
    """The modules that a site runs in, outermost first."""
    found = [model]
    for part in site.module.split("."):
        child = found[-1]._modules.get(part.partition("@")[0])
        if child is None:
            break
        found.append(child)
    return tuple(found)


def qconfig_of(
    site: Site, modules: tuple[nn.Module, ...], default: QConfig, overrides: Overrides
) -> QConfig | None:
    """The site's configuration: an override by name, else by class, else by op type, else default.

    Of several names the last given wins, as in a list of exceptions.
    """
    ops = {pattern.name for pattern in PATTERNS}
    ranked: list[tuple[float, QConfig | None]] = []
    for key, value in overrides.items():
        if isinstance(key, str):
            if key in ops and site.op == key:
                ranked.append((0, value))
            elif key not in ops and matches_name(site.name, key):
                ranked.append((2, value))
        elif depths := [i for i, module in enumerate(modules) if isinstance(module, key)]:
            ranked.append((1 + depths[-1] / len(modules), value))  # the innermost class wins
    if not ranked:
        return default
    best = max(rank for rank, _ in ranked)
    return [value for rank, value in ranked if rank == best][-1]


def annotate(
    sites: Sequence[tuple[Site, str]],
    model: nn.Module,
    placement: Placement,
    *,
    qconfig: QConfig,
    overrides: Overrides,
    module_filter: ModuleFilter,
) -> QuantPlan:
    """Decide for every site.

    Args:
        sites: each with the reason why its graph does not allow int8, empty if it does.
        model: the float model, for its classes.
        placement: what the backend wants.
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
        config = qconfig_of(site, modules, qconfig, overrides)
        activation = weight = None
        reason = obstacle or module_filter.refusal(site.name, site.op, modules) or ""
        if config is None:
            reason = reason or "left in float by an override"
        else:
            default = (placement.activation, placement.weight)
            wanted = placement.formats.get(site.op, default)
            if site.inputs or site.op in placement.stored:
                activation = config.input or wanted[0]
            if site.weight_shape:
                weight = config.weight or wanted[1]
            if not reason and site.op not in placement.ops:
                reason = f"{placement.name} has no int8 kernel for {site.op}"
            reason = reason or placement.refuse(site.op, activation, weight) or ""
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
                stored=site.stored if site.op in placement.stored else "",
                smooth=config.smooth if config is not None and site.smoothable else None,
            )
        )
    return QuantPlan(plan)


def _check(
    sites: Sequence[tuple[Site, str]],
    model: nn.Module,
    overrides: Overrides,
    module_filter: ModuleFilter,
) -> None:
    ops = [pattern.name for pattern in PATTERNS]
    names = [site.name for site, _ in sites]
    known = [*names, *(name for name, _ in model.named_modules() if name)]
    keys = [key for key in overrides if isinstance(key, str) and key not in ops]
    check_names(module_filter.names, known, "ModuleFilter name")
    check_names(keys, known, "override", ops)
    for key in overrides:
        if key in ops and key in known:
            raise InvalidConfig(
                f"override {key!r} is both an op type and a module of the model; write "
                f"{'[' + key[0] + ']' + key[1:]!r} for the module, or exclude_op_types for the op"
            )
    for op in module_filter.op_types:
        if op not in ops:
            raise InvalidConfig(f"unknown op type {op!r}; expected one of {', '.join(ops)}")
