"""Other formats of a site, each tried on the same float inputs as the planned one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch_quant.algorithms import without_data
from torch_quant.config import QConfig
from torch_quant.convert.lowering import Lowering
from torch_quant.core.spec import BFLOAT16
from torch_quant.errors import InvalidConfig
from torch_quant.session import Session

__all__ = ["candidate_lowerings", "checked_candidates"]


def checked_candidates(
    candidates: Mapping[str, QConfig] | Iterable[QConfig] | None,
) -> dict[str, QConfig]:
    """Candidates by name; a list of them is named by their weight formats.

    Raises:
        InvalidConfig: one is no QConfig; two have one name.

    >>> from torch_quant import recipes
    >>> list(checked_candidates([recipes.int4_weight_only(group_size=64)]))
    ['s4 symmetric per-group(64)']
    """
    if candidates is None:
        return {}
    if not isinstance(candidates, Iterable):
        raise InvalidConfig(f"candidates={candidates!r}; expected a dict or a list of QConfigs")
    if isinstance(candidates, Mapping):
        found = dict(candidates)
    else:
        found = {}
        for each in candidates:
            name = str(each.weight if isinstance(each, QConfig) else each)
            if name in found:
                raise InvalidConfig(f"two candidates are {name}: give a dict with names of yours")
            found[name] = each
    for name, each in found.items():
        if not isinstance(name, str) or not isinstance(each, QConfig):
            raise InvalidConfig(f"candidate {name!r} is {each!r}; expected a name and a QConfig")
    return found


def candidate_lowerings(session: Session, candidates: Mapping[str, QConfig]) -> dict[str, Lowering]:
    """How each candidate would quantize the model.

    A weight method that works with data is replaced by rounding to nearest: a candidate is scored
    before any weight is rounded.
    """
    found = {}
    for name, each in candidates.items():
        transforms = [x for x in each.transforms if not x.wants_blocks]
        config = replace(each, transforms=transforms)
        if each.input is not BFLOAT16:
            config = replace(config, method=without_data(each.method))
        found[name] = session.candidate(config)
    return found
