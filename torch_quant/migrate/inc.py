"""Configurations of Intel Neural Compressor 3, from what its ``to_json_file`` and ``save`` write.

Its files come in three shapes: one configuration, flat or as ``{"global": ..., "local": ...}``
(without a word of which class it is of, which its options tell); several, as ``{"rtn": ...,
"gptq": ...}``; and the ``qconfig.json`` of a saved model, ``{"('fc1', 'Linear')": {"rtn": ...}}``.
Local settings are found by ``re.match`` on the name of the layer, the last that matches holds. A
class decides where no name matches.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch_quant.config import OverrideKey, QConfig
from torch_quant.core.documents import shown
from torch_quant.core.naming import did_you_mean
from torch_quant.errors import InvalidConfig
from torch_quant.migrate import inc_static, inc_weights
from torch_quant.migrate.names import class_key, prefix_pattern
from torch_quant.migrate.options import Options
from torch_quant.migrate.result import Migration, Rows
from torch_quant.module_filter import ModuleFilter
from torch_quant.ops.table import OPERATORS

__all__ = ["from_inc"]


@dataclass(frozen=True)
class _Kind:
    """One class of the tool.

    Args:
        cls: its name there.
        read: makes a QConfig of its options, None for float.
        tells: options that it alone has, of those listed after it.
        weights: whether it rounds weights of linear layers alone.
    """

    cls: str
    read: Callable[[Options], QConfig | None]
    tells: tuple[str, ...]
    weights: bool = True


_KINDS = {
    "fp8_quant": _Kind("FP8Config", inc_static.fp8, ("fp8_config",), False),
    "smooth_quant": _Kind("SmoothQuantConfig", inc_static.smooth, ("alpha",), False),
    "mx_quant": _Kind("MXQuantConfig", inc_static.mx, ("blocksize", "round_method"), False),
    "static_quant": _Kind("StaticQuantConfig", inc_static.static, ("excluded_precisions",), False),
    "pt2e_dynamic_quant": _Kind("DynamicQuantConfig", inc_static.dynamic, ("act_algo",), False),
    "gptq": _Kind("GPTQConfig", inc_weights.gptq, ("percdamp", "static_groups", "act_order")),
    "awq": _Kind("AWQConfig", inc_weights.awq, ("use_auto_scale", "use_auto_clip")),
    "teq": _Kind("TEQConfig", inc_weights.teq, ("absorb_to_layer",)),
    "autoround": _Kind("AutoRoundConfig", inc_weights.autoround, ("iters", "scheme", "act_bits")),
    "hqq": _Kind("HQQConfig", inc_weights.hqq, ("quant_zero", "scale_quant_group_size")),
    "mixed_precision": _Kind("MixedPrecisionConfig", inc_static.mixed, (), False),
    "rtn": _Kind("RTNConfig", inc_weights.rtn, ("use_full_range", "use_double_quant")),
}
"""The tool's name of an algorithm -> its class; a class whose options tell it comes first."""
_CLASSES = {kind.cls: name for name, kind in _KINDS.items()} | {
    "INT8StaticQuantConfig": "static_quant"
}
_OTHERS = {
    "hybrid_gptq": "HybridGPTQConfig reads a checkpoint of GPTQ: load_checkpoint(folder) does that",
}
_BOOKKEEPING = ("params_list", "non_tunable_params", "_is_initialized", "_json_file", "white_list")
_HEADS = (".*lm_head", ".*output_layer", ".*embed_out")
"""What the tool takes for the head of a language model."""
_ONE = re.compile(r"\('(.+)', '(.+)'\)")


def from_inc(source: Any, *, kind: str | None = None) -> Migration:
    """The settings of a configuration of Intel Neural Compressor 3.

    Args:
        source: the path of a JSON file (``config.to_json_file``, or the ``qconfig.json`` beside a
            saved model), what it holds, or the configuration itself.
        kind: the tool's class or its name of the algorithm, ``"GPTQConfig"`` or ``"gptq"``, where
            the options do not tell.

    Raises:
        InvalidConfig: it is none of these, or an option has a wrong value; says which.

    >>> found = from_inc({"bits": 4, "group_size": 64, "use_full_range": True})
    >>> print(found.qconfig.weight)
    s4 symmetric per-group(64)
    """
    what, data, known = _data(source)
    name = _named(kind, what) if kind is not None else known
    rows, reading = Rows(), _Reading(what)
    parts = list(_parts(data, name, what))
    if not parts:
        raise InvalidConfig(f"{what} holds no configuration of Intel Neural Compressor")
    if any(part.layer for part in parts):
        return reading.of_layers(parts, rows)
    return reading.of_rules(parts, rows)


def _data(source: Any) -> tuple[str, Mapping[Any, Any], str | None]:
    """What messages call the source, its data, and its kind if that is known."""
    if isinstance(source, Mapping):
        return "the configuration", source, None
    if isinstance(source, (str, os.PathLike)):
        try:
            data = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InvalidConfig(f"cannot read the configuration {source}: {error}") from error
        if not isinstance(data, dict):
            raise InvalidConfig(f"{source} is {shown(data)}; expected an object")
        return str(source), data, None
    convert, name = getattr(source, "to_dict", None), getattr(source, "name", None)
    if not callable(convert) or not isinstance(name, str):
        raise InvalidConfig(
            f"{source!r} is no configuration of Intel Neural Compressor: expected one, its "
            "to_dict(), or the path of its JSON"
        )
    data = convert()
    known = None if name == "composable_config" else _named(name, type(source).__name__)
    return type(source).__name__, data, known


def _named(kind: str, what: str) -> str:
    name = _CLASSES.get(kind, kind)
    if name in _OTHERS:
        raise InvalidConfig(f"{what}: {_OTHERS[name]}")
    if name not in _KINDS:
        known = [*_KINDS, *_CLASSES]
        raise InvalidConfig(
            f"{what} is of the kind {kind!r}; expected one of {', '.join(known)}"
            f"{did_you_mean(kind, known)}"
        )
    return name


def _kind_of(options: Mapping[str, Any], what: str) -> str:
    """The algorithm whose options these are."""
    for name, kind in _KINDS.items():
        if any(each in options for each in kind.tells):
            return name
    if set(options) - {*_BOOKKEEPING} == {"dtype"}:
        return "mixed_precision"
    raise InvalidConfig(
        f"{what} does not say of which class it is, and {shown(sorted(map(str, options)))} does "
        'not tell: give kind=, as in migrate.from_inc(source, kind="RTNConfig")'
    )


@dataclass(frozen=True)
class _Part:
    """One set of options.

    Args:
        kind: the algorithm.
        options: as they were read.
        key: what they are for; None for everything that nothing else names.
        layer: whether ``key`` is the whole name of a layer.
    """

    kind: str
    options: Mapping[str, Any]
    key: Any = None
    layer: bool = False


def _parts(data: Mapping[Any, Any], kind: str | None, what: str) -> Iterator[_Part]:
    """Every set of options, in the order in which they hold."""
    if data and all(isinstance(key, str) and _ONE.fullmatch(key) for key in data):
        for key, value in data.items():
            found = _ONE.fullmatch(key)
            if found is None or not isinstance(value, Mapping) or len(value) != 1:
                raise InvalidConfig(f"{what}: {key} is {shown(value)}; expected one algorithm")
            ((name, options),) = value.items()
            yield _Part(_named(name, f"{what}: {key}"), _object(options, key), found[1], True)
        return
    if data and kind is None and all(key in {**_KINDS, **_OTHERS} for key in data):
        for name, value in data.items():
            yield from _parts(_object(value, name), _named(name, what), f"{what}: {name}")
        return
    if not {"global", "local"} & set(data):
        yield _Part(kind or _kind_of(data, what), data)
        return
    local = _object(data.get("local", {}), "local")
    whole = _object(data.get("global", {}), "global")
    others = [each for each in local.values() if isinstance(each, Mapping)]
    name = kind or _kind_of(whole or (others[0] if others else {}), what)
    if whole:
        yield _Part(name, whole)
    for key, value in local.items():
        yield _Part(name, _object(value, str(key)), key)


def _object(value: Any, what: str) -> Mapping[Any, Any]:
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if not isinstance(value, Mapping):
        raise InvalidConfig(f"{what} is {shown(value)}; expected an object")
    return value


@dataclass
class _Reading:
    """Parts on their way to settings.

    Args:
        what: what messages call the source.
    """

    what: str
    overrides: dict[OverrideKey, QConfig | None] = field(default_factory=dict)
    included: list[str] = field(default_factory=list)

    def _read(self, part: _Part, rows: Rows) -> QConfig | None:
        place = "" if part.key is None else f"{_text(part.key)}: "
        options = Options(part.options, place, rows, {*_BOOKKEEPING} - {"white_list"})
        if options.take("white_list", "*") not in ("*", ["*"], ("*",)):
            rows.left_out(
                options.entry("white_list"),
                "give module_filter=ModuleFilter(include_op_types=...) or its include_names",
            )
        try:
            if part.kind == "fp8_quant":
                self._lists(options)
            found = _KINDS[part.kind].read(options)
        except InvalidConfig as error:
            raise InvalidConfig(f"{self.what}: {_KINDS[part.kind].cls}: {error}") from error
        if found is not None:  # what is in float has no options
            options.finish()
        return found

    def of_rules(self, parts: list[_Part], rows: Rows) -> Migration:
        """One or several configurations with local settings."""
        wholes = [part for part in parts if part.key is None]
        qconfig = self._read(wholes[-1], rows) if wholes else None  # the last one holds
        for part in wholes[:-1]:
            self._read(part, Rows())
            rows.left_out(
                f"{_KINDS[part.kind].cls} for everything",
                f"{_KINDS[wholes[-1].kind].cls} for everything comes after it, and holds",
            )
        late: dict[OverrideKey, QConfig | None] = {}
        for part in parts:
            if part.key is None:
                continue
            key = self._key(part.key, rows)
            found = self._read(part, Rows() if key is None else rows)
            if key is not None:
                self.overrides.pop(key, None)
                self.overrides[key] = found
        configs = [qconfig, *self.overrides.values()]
        chosen = next((each for each in configs if each is not None), None)
        if chosen is None:
            raise InvalidConfig(f"{self.what} leaves everything in float: there is nothing to do")
        if qconfig is None:  # only what is listed is quantized
            rest: dict[OverrideKey, QConfig | None] = dict.fromkeys(f"op:{x}" for x in OPERATORS)
            self.overrides = rest | self.overrides
        if any(_KINDS[part.kind].weights for part in parts):
            late = self._heads(parts, rows)
        module_filter = self._scope(parts, rows)
        if module_filter.include_op_types == ("linear",):
            self.overrides = {
                key: value
                for key, value in self.overrides.items()
                if not (isinstance(key, str) and key.startswith("op:") and key != "op:linear")
            }
        overrides = self.overrides | late
        return Migration(self._origin(parts), chosen, overrides, module_filter, tuple(rows.found))

    def of_layers(self, parts: list[_Part], rows: Rows) -> Migration:
        """The layers of a saved model, each with its own."""
        read: dict[str, QConfig | None] = {}
        for part in parts:
            own = Rows()
            read[str(part.key)] = self._read(part, own)
            rows.found += own.found
        counts = Counter(each for each in read.values() if each is not None)
        if not counts:
            raise InvalidConfig(f"{self.what} leaves everything in float: there is nothing to do")
        chosen = counts.most_common(1)[0][0]
        listed = [name for name, found in read.items() if found is not None]
        overrides: dict[OverrideKey, QConfig | None] = {
            name: found for name, found in read.items() if found not in (None, chosen)
        }
        return Migration(
            self._origin(parts),
            chosen,
            overrides,
            ModuleFilter(include_names=tuple(listed)),
            tuple(rows.found),
        )

    def _origin(self, parts: list[_Part]) -> str:
        names = list(dict.fromkeys(_KINDS[part.kind].cls for part in parts))
        return f"{self.what}, Intel Neural Compressor's {' and '.join(names)}"

    def _key(self, key: Any, rows: Rows) -> OverrideKey | None:
        """What local settings are for, as an override says it; None if nothing can be."""
        found = class_key(key)
        if found is not None:
            why = "the name of a class" if isinstance(key, str) else ""
            rows.same(f"local {_text(key)!r}", found, why)
            return found
        if not isinstance(key, str):
            rows.left_out(f"local {_text(key)}", "it is no module class and no operator of here")
            return None
        if key in _HEADS:  # the tool itself adds these, whether or not there are such layers
            return f"re?:(?:{key}).*"
        pattern = prefix_pattern(key, f"{self.what}: local {key!r}")
        rows.same(f"local {key!r}", pattern, "names are matched from their beginning there")
        return pattern

    def _heads(self, parts: list[_Part], rows: Rows) -> dict[OverrideKey, QConfig | None]:
        """Heads of language models stay in float unless the options say otherwise."""
        weights = [part for part in parts if _KINDS[part.kind].weights]
        whole = [part for part in weights if part.key is None] or weights
        if any(part.options.get("quant_lm_head") for part in whole):
            rows.same("quant_lm_head = true", "the head is quantized as the rest")
            return {}
        rows.same(
            "quant_lm_head = false",
            "overrides for lm_head, output_layer, embed_out",
            "where the model has layers of these names",
        )
        return dict.fromkeys(f"re?:(?:{head}).*" for head in _HEADS)

    def _scope(self, parts: list[_Part], rows: Rows) -> ModuleFilter:
        if all(_KINDS[part.kind].weights or part.kind == "mx_quant" for part in parts):
            rows.same(
                "the layers of this class",
                "ModuleFilter(include_op_types='linear')",
                "linear layers alone",
            )
            return ModuleFilter(include_op_types=("linear",))
        if any(_KINDS[part.kind].weights for part in parts):
            rows.differs(
                "the layers of these classes",
                "everything that can be quantized",
                "module_filter says what is quantized at all",
            )
        elif parts[0].kind != "fp8_quant":
            rows.differs(
                "the layers of this class",
                "everything that can be quantized",
                "products of two activations (attention) and embeddings too: ModuleFilter("
                "exclude_op_types=['matmul', 'scaled_dot_product_attention', 'embedding']) "
                "leaves them in float",
            )
        return ModuleFilter(include_op_types=tuple(self.included))

    def _lists(self, options: Options) -> None:
        """FP8Config says with two lists which layers it is for."""
        blocked, allowed = options.take("blocklist", {}, dict), options.take("allowlist", {}, dict)
        names = _strings(blocked, "names", "blocklist")
        for name in names:
            self.overrides[f"re?:.*{re.escape(name)}.*"] = None
        classes = [(each, class_key(each)) for each in _strings(blocked, "types", "blocklist")]
        for name, key in classes:
            if key is None:
                options.rows.left_out(f"blocklist {name}", "no class of torch.nn has this name")
            else:
                self.overrides[key] = None
        if names or classes:
            entry = f"blocklist: {', '.join([*names, *(name for name, _ in classes)])}"
            options.rows.same(entry, "overrides, float")
        if only := _strings(allowed, "names", "allowlist"):
            options.rows.left_out(
                f"allowlist: {', '.join(only)}",
                "give module_filter=ModuleFilter(include_names=...)",
            )
        for name in _strings(allowed, "types", "allowlist"):
            operator = next((x for x in OPERATORS if x.replace("_", "") == name.lower()), None)
            if operator is None:
                options.rows.left_out(f"allowlist {name}", "it is no operator of here")
            else:
                options.rows.same(
                    f"allowlist {name}", f"ModuleFilter(include_op_types='{operator}')"
                )
                self.included.append(operator)


def _strings(data: Mapping[str, Any], name: str, what: str) -> list[str]:
    found = data.get(name, ())
    if not isinstance(found, (list, tuple)) or not all(isinstance(each, str) for each in found):
        raise InvalidConfig(f"{what} {name} is {shown(found)}; expected a list of names")
    return list(found)


def _text(key: Any) -> str:
    return key if isinstance(key, str) else getattr(key, "__name__", repr(key))
