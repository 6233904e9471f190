"""Which sizes a graph serves, as JSON: sympy's expressions as nested lists, never as text."""

from __future__ import annotations

from typing import Any

from torch_quant.errors import InvalidConfig
from torch_quant.graph.shapes import ShapeContract
from torch_quant.io.data.values import entries, wrong

__all__ = ["read_contract", "write_contract"]

_SYMPY = {
    "Add", "And", "Equality", "GreaterThan", "LessThan", "Max", "Min", "Mod", "Mul", "Not", "Or",
    "Pow", "StrictGreaterThan", "StrictLessThan", "Unequality", "Xor", "ceiling", "floor",
    "Piecewise", "ExprCondPair", "Abs",
}  # fmt: skip
_TORCH = {
    "CeilToInt", "CleanDiv", "FloatPow", "FloatTrueDiv", "FloorDiv", "FloorToInt", "Identity",
    "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "LShift", "Max", "Min", "ModularIndexing",
    "OpaqueUnaryFn_sqrt", "PowByNatural", "PythonMod", "RShift", "RoundDecimal", "RoundToInt",
    "ToFloat", "TruncToInt", "TruncToFloat", "Where",
}  # fmt: skip
"""Of ``torch.utils._sympy.functions``, by their names, as they are slow to import."""


_GROWING = {"LShift", "Pow", "PowByNatural"}
_MOST = 16
"""The largest exponent: sympy computes powers of numbers, however long that takes."""


def write_contract(contract: ShapeContract) -> dict[str, Any]:
    """A contract as JSON.

    Raises:
        InvalidConfig: a condition holds something that is not known here.
    """
    return {
        "names": list(contract.names),
        "shapes": [list(shape) for shape in contract.shapes],
        "conditions": [_written(each) for each in contract.conditions],
        "derived": [[i, axis, _written(each)] for i, axis, each in contract.derived],
    }


def read_contract(data: Any, what: str) -> ShapeContract:
    """Undo :func:`write_contract`; raises :class:`InvalidConfig` for anything else."""
    found = entries(data, f"the sizes of {what}", "names", "shapes", "conditions", "derived")
    names, shapes, conditions, derived = found.values()
    if not all(isinstance(each, list) for each in found.values()):
        raise wrong(f"the sizes of {what}", data, "lists")
    if not all(isinstance(name, str) for name in names) or len(names) != len(shapes):
        raise wrong(f"the sizes of {what}", names, "a name for each input")
    for shape in shapes:
        good = isinstance(shape, list) and all(type(size) in (int, str) for size in shape)
        if not good:
            raise wrong(f"a shape of {what}", shape, "sizes and names of sizes")
    places = []
    for each in derived:
        if (
            not isinstance(each, list)
            or len(each) != 3
            or not all(type(n) is int and n >= 0 for n in each[:2])
        ):
            raise wrong(f"a size of {what}", each, "an input, an axis and an expression")
        if each[0] >= len(shapes) or each[1] >= len(shapes[each[0]]):
            raise wrong(f"a size of {what}", each[:2], "an axis of an input")
        places.append((each[0], each[1], _read(each[2], what)))
    return ShapeContract(
        names,
        [tuple(shape) for shape in shapes],
        [_read(each, what) for each in conditions],
        places,
    )


def _written(expression: Any) -> Any:
    """``["Equality", "s0", 2]``: the class and what it is of, a symbol as its name."""
    kind = type(expression).__name__
    if kind == "Symbol":
        return expression.name
    if not expression.args:
        if expression.is_Boolean:
            return bool(expression)
        if expression.is_Integer:
            return int(expression)
        if expression.is_Rational:
            return ["Rational", int(expression.p), int(expression.q)]
        if expression.is_Float:
            return ["Float", float(expression)]
        if str(expression) in ("oo", "-oo", "int_oo", "-int_oo"):
            return ["Infinity", "-" if str(expression).startswith("-") else "+"]
    if kind not in _SYMPY | _TORCH:
        raise InvalidConfig(f"a condition on sizes holds {kind}, which cannot be saved")
    return [kind, *(_written(each) for each in expression.args)]


def _read(data: Any, what: str) -> Any:
    import sympy  # type: ignore[import-untyped]

    if type(data) is bool:
        return sympy.true if data else sympy.false
    if type(data) is int and abs(data) < 1 << 64:
        return sympy.Integer(data)
    if isinstance(data, str) and data.isidentifier():
        return sympy.Symbol(data, integer=True)
    if not isinstance(data, list) or not data or not isinstance(data[0], str):
        raise wrong(f"a condition of {what}", data, "an expression of sizes")
    kind, *args = data
    if kind == "Rational" and len(args) == 2 and all(type(each) is int for each in args):
        return sympy.Rational(*args)
    if kind == "Float" and len(args) == 1 and type(args[0]) is float:
        return sympy.Float(args[0])
    if kind == "Infinity" and args in (["+"], ["-"]):
        return sympy.oo if args == ["+"] else -sympy.oo
    if kind not in _SYMPY | _TORCH:
        raise wrong(f"a condition of {what}", kind, "a known function of sizes")
    from torch.utils._sympy import functions

    cls = getattr(functions, kind, None) if kind in _TORCH else None
    if cls is None:
        special = {"ExprCondPair": sympy.functions.elementary.piecewise.ExprCondPair}
        cls = special.get(kind) or getattr(sympy, kind)
    values = [_read(each, what) for each in args]
    if kind in _GROWING and not (args and type(args[-1]) is int and abs(args[-1]) <= _MOST):
        raise wrong(f"a condition of {what}", data, f"a number up to {_MOST} at the end of {kind}")
    try:
        return cls(*values)
    except InvalidConfig:
        raise
    except Exception as error:  # whatever sympy says of arguments that make no sense
        raise wrong(f"a condition of {what}", data, f"arguments of {kind}") from error
