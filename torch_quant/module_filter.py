"""Which sites are quantized at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_quant.core.documents import Lines, Place, check_keys, check_kind, shown
from torch_quant.core.naming import class_named, class_path, matches_name
from torch_quant.errors import InvalidConfig

__all__ = ["ModuleFilter", "read_filter"]


def _names(value: Iterable[str] | str) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


@dataclass(frozen=True)
class ModuleFilter:
    """Which sites are quantized. Exclude beats include; names beat classes and op types.

    A name is that of a site or of a module above it, or a glob (``"encoder.layer.0.*"``). With any
    include given, only what it covers is quantized. In order: an excluded name, an included name,
    an excluded class or op type, an included class or op type decides.

    Raises:
        InvalidConfig: when it is applied, for a name that matches nothing.
    """

    include_names: tuple[str, ...] = ()
    exclude_names: tuple[str, ...] = ()
    include_classes: tuple[type[nn.Module], ...] = ()
    exclude_classes: tuple[type[nn.Module], ...] = ()
    include_op_types: tuple[str, ...] = ()
    exclude_op_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include_names", "exclude_names", "include_op_types", "exclude_op_types"):
            given = _names(getattr(self, name))
            if not all(isinstance(each, str) for each in given):
                raise InvalidConfig(
                    f"ModuleFilter({name}=...) holds {given!r}; expected names, and module classes "
                    f"as {name.partition('_')[0]}_classes"
                )
            object.__setattr__(self, name, given)
        for name in ("include_classes", "exclude_classes"):
            value = getattr(self, name)
            classes = (value,) if isinstance(value, type) else tuple(value)
            if not all(isinstance(c, type) and issubclass(c, nn.Module) for c in classes):
                raise InvalidConfig(f"ModuleFilter({name}=...) holds {value!r}; expected classes")
            object.__setattr__(self, name, classes)

    def to_dict(self) -> dict[str, Any]:
        """What is not empty, ready for JSON and YAML; :meth:`from_dict` reads it back.

        Raises:
            InvalidConfig: a class cannot be found by its path.

        >>> ModuleFilter(exclude_names="head", exclude_classes=nn.LSTM).to_dict()
        {'exclude_names': ['head'], 'exclude_classes': ['torch.nn.LSTM']}
        """
        data = {name: list(getattr(self, name)) for name in _FILTERS}
        for name in ("include_classes", "exclude_classes"):
            data[name] = [class_path(cls) for cls in getattr(self, name)]
        return {name: values for name, values in data.items() if values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModuleFilter:
        """Read what :meth:`to_dict` gives; one name may stand without a list around it.

        Raises:
            InvalidConfig: an entry is unknown or wrong, or a class is not imported.

        >>> ModuleFilter.from_dict({"exclude_classes": "torch.nn.LSTM"}).exclude_classes
        (<class 'torch.nn.modules.rnn.LSTM'>,)
        """
        return read_filter(data, (), "the filter", Lines("ModuleFilter.from_dict"))

    def refusal(self, name: str, op: str, modules: tuple[nn.Module, ...]) -> str | None:
        """Why the site stays in float, or None.

        Args:
            name: the site.
            op: its op type.
            modules: the modules it runs in, outermost first.

        >>> ModuleFilter(exclude_names="encoder.*").refusal("encoder.query", "linear", ())
        'excluded by name'
        """
        return self.verdict(name, op, modules)[0]

    def verdict(self, name: str, op: str, modules: tuple[nn.Module, ...]) -> tuple[str | None, str]:
        """Why the site stays in float, or None, and the entry that decides, empty if none does.

        Args:
            name: the site.
            op: its op type.
            modules: the modules it runs in, outermost first.

        >>> ModuleFilter(exclude_names="encoder.*").verdict("encoder.query", "linear", ())
        ('excluded by name', "exclude_names='encoder.*'")
        """

        def named(patterns: tuple[str, ...]) -> str | None:
            return next((repr(each) for each in patterns if matches_name(name, each)), None)

        def classed(classes: tuple[type[nn.Module], ...]) -> str | None:
            found = (c.__qualname__ for c in classes if any(isinstance(m, c) for m in modules))
            return next(found, None)

        if entry := named(self.exclude_names):
            return "excluded by name", f"exclude_names={entry}"
        if entry := named(self.include_names):
            return None, f"include_names={entry}"
        if entry := classed(self.exclude_classes):
            return "excluded by class", f"exclude_classes={entry}"
        if op in self.exclude_op_types:
            return "excluded by op type", f"exclude_op_types={op!r}"
        if entry := classed(self.include_classes):
            return None, f"include_classes={entry}"
        if op in self.include_op_types:
            return None, f"include_op_types={op!r}"
        if self.include_names or self.include_classes or self.include_op_types:
            return "not included", "no include_ entry covers it"
        return None, ""

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.include_names, *self.exclude_names)

    @property
    def op_types(self) -> tuple[str, ...]:
        return (*self.include_op_types, *self.exclude_op_types)


_FILTERS = (
    "include_names", "exclude_names", "include_classes", "exclude_classes", "include_op_types",
    "exclude_op_types",
)  # fmt: skip


def read_filter(data: Any, place: Place, what: str, lines: Lines) -> ModuleFilter:
    """The filter that stands at ``place`` of a file, as :func:`read_qconfig` reads a QConfig."""
    check_kind(data, dict, place, what, lines)
    check_keys(data, place, _FILTERS, what, lines, optional=_FILTERS)
    values: dict[str, Any] = {}
    for name, given in data.items():
        entries = [given] if isinstance(given, str) else given
        if not isinstance(entries, list) or not all(isinstance(e, str) and e for e in entries):
            message = f"{what}: {name!r} is {shown(given)}; expected a list of names"
            raise lines.error((*place, name), message)
        values[name] = list(entries)
        for i, entry in enumerate(entries):
            try:
                if name.endswith("_classes"):
                    values[name][i] = class_named(entry.removeprefix("class:"))
                elif name.endswith("_names"):
                    matches_name("x", entry)  # compiles a regular expression
            except InvalidConfig as error:
                at = (*place, name) if isinstance(given, str) else (*place, name, i)
                raise lines.error(at, f"{what}: {name!r}: {error}") from error
    return ModuleFilter(**values)
