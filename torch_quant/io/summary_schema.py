"""What a summary file may hold: every entry is checked; what is wrong is named with its line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch_quant.core.documents import Lines, Place, check_keys, check_kind, shown
from torch_quant.core.element_type import ElementType
from torch_quant.core.elements import ELEMENT_TYPES
from torch_quant.core.granularity import Granularity
from torch_quant.core.methods import read_transform, read_weight_method
from torch_quant.core.plan import PRECISIONS, is_share
from torch_quant.core.spec import FLOAT, ScaleType
from torch_quant.errors import InvalidConfig
from torch_quant.graph.policy import checked_capture
from torch_quant.ops.table import OPERATORS
from torch_quant.statistics import mean_of

__all__ = ["FORMAT", "VERSION", "renewed", "validate", "written"]

FORMAT = "torch_quant summary"
VERSION = 4
"""Older ones are read too. Version 1 knew integers per tensor and per channel only, version 2 knew
of transforms SmoothQuant's alpha only, ``smooth``, version 3 did not say what was one graph, and
had ``stored`` for ``quantized_output``."""

_LARGEST = 3.4e38
"""Beyond, a number is no float32."""
_MOST = 2**63
"""What tensors count up to."""
_SITE = (
    "name", "op", "inputs", "activation", "weight", "quantized", "reason", "macs", "precision",
    "quantized_output", "transforms", "method",
)  # fmt: skip
_SITE_3 = tuple("stored" if field == "quantized_output" else field for field in _SITE)
_SITE_2 = (*_SITE_3[:-2], "smooth")
_SITES = {1: _SITE_2, 2: _SITE_2, 3: _SITE_3, 4: _SITE}
"""Version -> the entries of a site."""
_SPEC = ("element", "symmetric", "granularity", "scale_type", "dynamic")
_SPEC_1 = ("dtype", "symmetric", "granularity")
_DTYPES = ("uint8", "int8")
"""Of version 1, which has ``_SPEC_1`` for a format."""
_LIMITS = ("quant_min", "quant_max")


def validate(data: Any, lines: Lines) -> None:
    """Raise :class:`InvalidConfig` unless ``data`` is a summary, complete and free of mistakes."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise lines.error(
            ("format",), f"this is no summary of torch_quant: it lacks format: {FORMAT!r}"
        )
    version: Any = data.get("version")
    if not _integer(version) or not 1 <= version <= VERSION:
        raise lines.error(("version",), f"this has version {version!r}; expected 1 to {VERSION}")
    optional = ("channels", "means", "capture") if version > 3 else ("channels",)
    known = ("format", "version", "sites", "ranges", *optional)
    check_keys(data, (), known, "the file", lines, optional=optional)
    if data.get("capture") is not None:
        try:
            checked_capture(data["capture"])
        except InvalidConfig as error:
            raise lines.error(("capture",), str(error)) from error
    sites = check_kind(data["sites"], list, ("sites",), "'sites'", lines)
    names: set[str] = set()
    for i, site in enumerate(sites):
        name = _site(site, ("sites", i), lines, version)
        if name in names:
            raise lines.error(("sites", i, "name"), f"the site {name!r} is given twice")
        names.add(name)
    for key, ends in check_kind(data["ranges"], dict, ("ranges",), "'ranges'", lines).items():
        _range(ends, ("ranges", key), f"the range of {key}", lines)
    channels = check_kind(data.get("channels", {}), dict, ("channels",), "'channels'", lines)
    for key, pair in channels.items():
        _channels(pair, ("channels", key), f"the channels of {key}", lines)
    means = check_kind(data.get("means", {}), dict, ("means",), "'means'", lines)
    for key, known in means.items():
        what = f"the means of {key}"
        for label, each in check_kind(known, dict, ("means", key), what, lines).items():
            try:
                mean_of(label)
            except InvalidConfig as error:
                raise lines.error(("means", key, label), f"{what}: {error}") from error
            _means(each, ("means", key, label), what, lines)


def _site(site: Any, place: Place, lines: Lines, version: int) -> str:
    number = f"site {place[-1]}"
    check_kind(site, dict, place, number, lines)
    name: str = check_kind(site.get("name"), str, (*place, "name"), f"the name of {number}", lines)
    if not name:
        raise lines.error((*place, "name"), f"the name of {number} is empty")
    check_keys(site, place, _SITES[version], name, lines)

    def wrong(field: str, expected: str) -> InvalidConfig:
        found = shown(site[field])
        return lines.error((*place, field), f"{name}: {field!r} is {found}; expected {expected}")

    if not isinstance(site["op"], str) or site["op"] not in OPERATORS:
        raise wrong("op", f"one of {', '.join(OPERATORS)}")
    inputs = site["inputs"]
    if not isinstance(inputs, list) or not all(isinstance(key, str) and key for key in inputs):
        raise wrong("inputs", "a list of names of tensors")
    for field in {"reason", "stored", "quantized_output"} & set(site):
        if not isinstance(site[field], str):
            raise wrong(field, "a string")
    if not isinstance(site["quantized"], bool):
        raise wrong("quantized", "true or false, without quotes")
    if not _integer(site["macs"]) or site["macs"] < 0:
        raise wrong("macs", "an integer, 0 or more")
    if site["precision"] not in PRECISIONS:
        raise wrong("precision", " or ".join(map(repr, PRECISIONS)))
    if site["quantized"] and site["precision"] != PRECISIONS[0]:
        raise wrong("precision", f"{PRECISIONS[0]!r}, since the site is quantized")
    _methods(site, place, name, lines, wrong)
    for field, has in _has(site).items():
        if site[field] is None and has and site["quantized"]:
            raise wrong(field, f'a format, "{FLOAT}", or "quantized": false')
        if site[field] is not None and site[field] != str(FLOAT):
            _spec(site[field], (*place, field), f"{name}: {field!r}", lines, field, version)
    return name


def _methods(
    site: Mapping[str, Any], place: Place, name: str, lines: Lines,
    wrong: Callable[[str, str], InvalidConfig],
) -> None:  # fmt: skip
    """Raise unless transforms and weight method are known, with options that they have."""
    if "smooth" in site:
        smooth = site["smooth"]
        if smooth is not None and (isinstance(smooth, bool) or not is_share(smooth)):
            raise wrong("smooth", "a number from 0 to 1, or null")
        return
    if not isinstance(site["transforms"], list):
        raise wrong("transforms", "a list")
    entries: list[tuple[Callable[[Any], Any], Any, Place]] = [
        (read_transform, each, ("transforms", i)) for i, each in enumerate(site["transforms"])
    ]
    if site["method"] is not None:
        entries.append((read_weight_method, site["method"], ("method",)))
    for read, data, at in entries:
        try:
            read(data)
        except InvalidConfig as error:
            raise lines.error((*place, *at), f"{name}: {error}") from error


def _has(site: Mapping[str, Any]) -> dict[str, bool]:
    """Which of its formats a site has a tensor for."""
    weighted = OPERATORS[site["op"]].weight is not None
    return {"activation": bool(site["inputs"]), "weight": weighted}


def written(site: Mapping[str, Any]) -> dict[str, Any]:
    """A site's entries in the form of a file: what it leaves in float says so."""
    found = dict(site)
    if site["quantized"]:
        stays = [field for field, has in _has(site).items() if has and site[field] is None]
        found |= dict.fromkeys(stays, str(FLOAT))
    return found


def renewed(site: Mapping[str, Any]) -> dict[str, Any]:
    """A site's entries as a plan has them; older versions included."""
    if "stored" in site:
        kept = {key: value for key, value in site.items() if key != "stored"}
        site = kept | {"quantized_output": site["stored"]}
    floats = [field for field in ("activation", "weight") if site[field] == str(FLOAT)]
    site = {**site, **dict.fromkeys(floats)}
    if "smooth" not in site:
        return dict(site)
    kept = {key: value for key, value in site.items() if key != "smooth"}
    alpha = site["smooth"]
    smoothed = [] if alpha is None else [{"name": "smoothquant", "alpha": alpha}]
    return kept | {"transforms": smoothed, "method": None}


def _spec(spec: Any, place: Place, what: str, lines: Lines, field: str, version: int) -> None:
    check_kind(spec, dict, place, what, lines)

    def wrong(entry: str, expected: str) -> InvalidConfig:
        found = shown(spec[entry])
        return lines.error((*place, entry), f"{what}: {entry!r} is {found}; expected {expected}")

    old = version == 1
    entry = "dtype" if old else "element"
    optional = _LIMITS if old else (*_LIMITS, "float_zero_points", "clip")
    check_keys(spec, place, (*(_SPEC_1 if old else _SPEC), *optional), what, lines, optional)
    known = {name: each for name, each in ELEMENT_TYPES.items() if not old or name in _DTYPES}
    element = known.get(spec[entry]) if isinstance(spec[entry], str) else None
    if element is None:
        raise wrong(entry, f"one of {', '.join(known)}")
    if not isinstance(spec["symmetric"], bool):
        raise wrong("symmetric", "true or false, without quotes")
    _granularity(spec["granularity"], field, old, wrong)
    _limits(spec, element, place, what, lines)
    if old:
        return
    types = [each.value for each in ScaleType]
    if spec["scale_type"] not in types:
        raise wrong("scale_type", f"one of {', '.join(types)}")
    if not isinstance(spec["dynamic"], bool):
        raise wrong("dynamic", "true or false, without quotes")
    if (floats := spec.get("float_zero_points", False)) not in (False, True):
        raise wrong("float_zero_points", "true or false, without quotes")
    if floats and (spec["symmetric"] or spec["dynamic"]):
        raise wrong("float_zero_points", "false in a format that is symmetric or dynamic")
    clip = spec.get("clip", 1.0)
    if not isinstance(clip, (int, float)) or isinstance(clip, bool) or not 0.0 < clip <= 1.0:
        raise wrong("clip", "a share of the recorded range, above 0 and up to 1")
    if clip != 1.0 and spec["dynamic"]:
        raise wrong("clip", "1, since dynamic scales have no recorded range")
    if not spec["symmetric"] and not element.integer:
        raise wrong("symmetric", f"true, since {element} has no zero point")
    if not spec["symmetric"] and spec["scale_type"] == ScaleType.E8M0.value:
        raise wrong("symmetric", "true, since scales of powers of two have no zero point")


def _limits(
    spec: Mapping[str, Any], element: ElementType, place: Place, what: str, lines: Lines
) -> None:
    """Raise unless integers, and only they, say from where to where they go."""
    for limit in _LIMITS:
        if element.integer != (limit in spec):
            verb = "lacks" if element.integer else "is no integer type, but has"
            raise lines.error(place, f"{what} {verb} {limit!r}")
    if not element.integer:
        return

    def wrong(entry: str, expected: str) -> InvalidConfig:
        found = shown(spec[entry])
        return lines.error((*place, entry), f"{what}: {entry!r} is {found}; expected {expected}")

    low, high = element.quant_min, element.quant_max
    for limit in _LIMITS:
        if not _integer(spec[limit]) or not low <= spec[limit] <= high:
            raise wrong(limit, f"an integer from {low} to {high}")
    if spec["quant_min"] >= spec["quant_max"]:
        raise wrong("quant_max", f"more than quant_min, {spec['quant_min']}")
    if low < 0 and not spec["quant_min"] < 0 <= spec["quant_max"]:
        raise wrong("quant_min", f"codes on both sides of 0, since {element} is signed")


def _granularity(
    given: Any, field: str, old: bool, wrong: Callable[[str, str], InvalidConfig]
) -> None:
    """Raise unless a granularity is one that activations or weights can have."""
    allowed = ["per_tensor"]
    if field == "weight":
        allowed += ["per_channel"]
        allowed += [] if old else ["per_channel(axis)", "per_group(size)", "per_block(sizes)"]
    elif not old:
        allowed += ["per_token", "per_group(size)"]
    try:
        kind = Granularity.parse(given).kind if isinstance(given, str) else ""
    except InvalidConfig:
        kind = ""
    if kind not in {each.partition("(")[0] for each in allowed} or (old and given != kind):
        raise wrong("granularity", " or ".join(map(repr, allowed)))


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    """Whether it is a finite number that float32 can hold."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and math.isfinite(value) and abs(value) <= _LARGEST


def _range(ends: Any, place: Place, what: str, lines: Lines) -> None:
    if not isinstance(ends, list) or len(ends) != 2 or not all(map(_number, ends)):
        raise lines.error(
            place, f"{what} is {shown(ends)}; expected [low, high], two finite numbers"
        )
    if ends[0] > ends[1]:
        raise lines.error(place, f"{what} is {ends}; expected low <= high")


def _means(known: Any, place: Place, what: str, lines: Lines) -> None:
    check_kind(known, dict, place, what, lines)
    check_keys(known, place, ("batches", "rows", "sums"), what, lines)
    for name in ("batches", "rows"):
        if not _integer(known[name]) or not 1 <= known[name] < _MOST:
            message = f"{what}: {name!r} is {shown(known[name])}; expected 1 or more, below 2**63"
            raise lines.error((*place, name), message)
    sums = known["sums"]
    if not isinstance(sums, list) or not sums:
        raise lines.error((*place, "sums"), f"{what} are {shown(sums)}; expected numbers")
    for i, value in enumerate(sums):
        if not _number(value):
            message = f"{what}: {shown(value)} is no finite number"
            raise lines.error((*place, "sums", i), message)


def _channels(pair: Any, place: Place, what: str, lines: Lines) -> None:
    lists = isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, list) for x in pair)
    if not lists or len(pair[0]) != len(pair[1]) or not pair[0]:
        raise lines.error(
            place, f"{what} are {shown(pair)}; expected two lists, as many minima as maxima"
        )
    for side, values in enumerate(pair):
        for i, value in enumerate(values):
            if not _number(value):
                message = f"{what}: {shown(value)} is no finite number"
                raise lines.error((*place, side, i), message)
    for i, (low, high) in enumerate(zip(*pair, strict=True)):
        if low > high:
            message = f"{what}: the minimum {low} of channel {i} is above its maximum {high}"
            raise lines.error((*place, 0, i), message)
