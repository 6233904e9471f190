"""The page of errors: what it quotes is what the package says, and what is raised is on it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^\| \"(.+?)\" \|", PAGE, re.MULTILINE)
LISTED = ("BackendUnavailable", "CaptureFailed", "NotCalibrated", "UnsupportedOp")
"""Errors whose every message is on the page; of InvalidConfig, those that beginners meet are."""

WITHIN = {
    "a hook on ": "the module runs in pieces then",
    "a tensor within it has no element": "the graph runs in PyTorch then, with a warning",
    "it writes to ": "the graph runs in PyTorch then, with a warning",
    "onnxruntime takes and gives bfloat16": "the graph runs in PyTorch then, with a warning",
    "Inductor does not compile it": "the graph runs in PyTorch then, with a warning",
    "torch.export does not take it": "the graph runs in PyTorch then, with a warning",
    "onnxruntime does not load it": "the graph runs in PyTorch then, with a warning",
    "OpenVINO does not load it": "the graph runs in PyTorch then, with a warning",
    "the call has no tensor input": "the module runs as Python then",
    "an output nests objects more than 8 deep": "the module runs in pieces then",
    "the graph gives ": "the module runs in pieces then",
    "the model takes no other number": "the number is fixed then",
    "as one graph it serves only ": "the module runs in pieces then",
    "symbolic sizes took too long": "the module runs in pieces then",
    "there is no range for ": "a graph in which nothing is quantized asks for none",
    "nothing was recorded of ": "a graph in which nothing is quantized asks for nothing",
    "GPTQ needs the Hessian": "who calls the method itself is told; calibration records it",
}
"""How messages begin that no user of a quantizer is shown as an error, and what happens."""


def _literals(node: ast.AST) -> Iterator[str]:
    """The parts of a message that stand in the source, with a mark where values go."""
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        for part in node.values:
            yield from _literals(part) if isinstance(part, ast.Constant) else ("\0",)
    elif isinstance(node, (ast.BinOp, ast.IfExp)):
        sides = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.body, node.orelse)
        for side in sides:
            yield from _literals(side)
    else:
        yield "\0"


def _sources() -> Iterator[ast.Module]:
    for package in ("torch_quant", "torch_quant_cli"):
        for file in sorted((ROOT / package).rglob("*.py")):
            yield ast.parse(file.read_text(encoding="utf-8"))


def _raised(kinds: tuple[str, ...]) -> set[str]:
    return {
        "".join(_literals(made.args[0]))
        for source in _sources()
        for node in ast.walk(source)
        if isinstance(node, ast.Raise) and node.exc is not None
        for made in ast.walk(node.exc)  # CaptureFailed(...).leaving(...) too
        if isinstance(made, ast.Call)
        and isinstance(made.func, ast.Name)
        and made.func.id in kinds
        and made.args
    }


def _quotes(quoted: str, text: str) -> bool:
    """Whether ``text`` has the parts of ``quoted`` between its ``...``, in order."""
    place = 0
    for part in (each.strip() for each in quoted.split("...")):
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


@pytest.mark.newest("the source is the same for every torch")
def test_every_error_that_leaves_the_package_is_on_the_page() -> None:
    raised = {text for text in _raised(LISTED) if len(text.replace("\0", "")) > 12}
    assert len(raised) > 40
    missing = {
        text
        for text in raised
        if not any(_quotes(each, text) for each in QUOTED)
        and not any(text.startswith(each) for each in WITHIN)
    }
    assert not missing, "\n".join(sorted(missing))
    assert not [each for each in WITHIN if not any(text.startswith(each) for text in raised)]


@pytest.mark.newest("the source is the same for every torch")
def test_what_the_page_quotes_is_said_by_the_package() -> None:
    said = {
        "".join(_literals(node))
        for source in _sources()
        for node in ast.walk(source)
        if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp, ast.IfExp))
    }
    assert len(QUOTED) > 30
    unknown = [each for each in QUOTED if not any(_quotes(each, text) for text in said)]
    assert not unknown, unknown
