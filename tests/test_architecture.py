"""How the package is layered, read off its source: imports go one way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "torch_quant"
COMMANDS = ROOT / "torch_quant_cli"
"""The command line, which stands to the right of all layers."""

LAYERS = (
    "version", "errors", "core", "ops", "native", "statistics", "config", "module_filter", "nn",
    "graph", "passes", "state", "model", "convert",
    "backends", "algorithms", "recipes", "io", "report", "settings", "calibrated", "session",
    "profiling", "rounding", "explain", "unseen", "configuration", "choices", "proxies",
    "amp", "qat", "regions", "comparing", "reporting", "quantizer_base", "quantizer_files",
    "quantizer_training", "quantizer_reports", "quantizer_page", "quantizer",
    "trials", "tuning", "autotuning", "migrate", "checkpoints", "integrations",
)  # fmt: skip
"""Each is ``torch_quant/<name>.py`` or ``torch_quant/<name>/``, and may import from its left."""

OPTIONAL = {
    "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino",
    "intel_extension_for_pytorch", "matplotlib", "tabulate", "tqdm", "scipy", "sklearn", "yaml",
}  # fmt: skip
AO = {"statistics/ao_adapter.py", "ops/decomposed.py"}
ADAPTERS = {f"integrations/{name}.py" for name in ("generation", "trainer", "transformers")}
"""Files for those who have an optional package; nothing here imports them unless it is loaded."""
SEAMS = {"core/methods.py", "calibrated.py"}
"""Files whose types name what stands to their right: what those are given who extend them."""
MOST_LINES = 400

BACKENDS = {
    path.name: PACKAGE / "backends" / path.name
    for path in (PACKAGE / "backends").iterdir()
    if (path / "__init__.py").exists()
}
"""Name of a runtime that has a room of its own -> the room."""
READERS = {"onnxruntime": "onnx", "openvino": "onnx", "inductor": "onednn"}
"""Name of a runtime that reads files of a format, or calls kernels of another -> the room of the
format or the kernels, which knows it."""
REGISTRY = {"__init__.py", "backends/__init__.py", "backends/base.py", "migrate/__init__.py"}
"""Where backends are listed, with their types; where what reads files of others is."""
FORMATS = {
    "io/onnx": "onnx", "io/ipex": "ipex", "io/inductor": "inductor", "migrate/onnx": "onnx",
    "migrate/ipex": "ipex",
}  # fmt: skip
"""Files that write or read what belongs to one runtime: how their paths begin -> its name."""

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
OF_COMMANDS = sorted(f"../{path.relative_to(ROOT).as_posix()}" for path in COMMANDS.rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """``module`` is what is imported, ``top`` whether that happens when the file is loaded."""

    module: str
    line: int
    top: bool


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text())


def _walk(node: ast.AST, top: bool) -> Iterator[tuple[ast.AST, bool]]:
    yield node, top
    later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
        isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, top and not later)


@cache
def imports_of(file: str, tree: ast.Module | None = None) -> list[Import]:
    """Every import in ``file``, at any depth; ``from a import b`` counts as ``a.b``."""
    found = []
    package = ["torch_quant", *Path(file).parent.parts]
    for node, top in _walk(tree or tree_of(file), top=True):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found += [Import(f"{source}.{alias.name}", node.lineno, top) for alias in node.names]
    return found


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def layer_of(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


def imported_layer(module: str) -> str:
    """The layer of an import from the package; the package itself counts as the last."""
    name = module.split(".")[1] if "." in module else ""
    return name if name in LAYERS else "__init__"


# Each rule is one test that lists what breaks it: a test for each file would be two thousand.


def test_every_file_has_a_layer() -> None:
    without = [file for file in FILES if layer_of(file) not in (*LAYERS, "__init__")]
    assert not without, "say in tests/test_architecture.py where their layer belongs"


def test_imports_go_one_way() -> None:
    wrong = []
    for file in (each for each in FILES if layer_of(each) in LAYERS):
        allowed = LAYERS[: LAYERS.index(layer_of(file)) + 1]
        wrong += [
            f"torch_quant/{file}:{found.line} imports {found.module}; "
            f"layer {allowed[-1]} may import only from {', '.join(allowed)}"
            for found in imports_of(file)
            if within(found.module, "torch_quant")
            and (found.top or file not in SEAMS)
            and imported_layer(found.module) not in allowed
        ]
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Packages gather what their files have: a file never imports through its own package."""
    edges = {
        file: {
            other
            for found in imports_of(file)
            if found.top and within(found.module, "torch_quant")
            for other in _files_of(found.module)
            if other != file
        }
        for file in FILES
        if not file.endswith("__init__.py")
    }
    done: set[str] = set()

    def visit(file: str, path: tuple[str, ...]) -> None:
        assert file not in path, " imports ".join([*path[path.index(file) :], file])
        if file not in done:
            for other in edges.get(file, ()):
                visit(other, (*path, file))
            done.add(file)

    for file in edges:
        visit(file, ())


def _files_of(module: str) -> list[str]:
    """The file that an import is of: that of the module, or of the module it is a name in."""
    parts = module.split(".")[1:]
    names = ["/".join(parts[:n]) + ".py" for n in (len(parts), len(parts) - 1) if n > 0]
    return [name for name in names if name in FILES][:1]


def test_torch_ao_is_not_used() -> None:
    ours = [
        f"torch_quant/{file}:{i.line}"
        for file in FILES
        for i in imports_of(file)
        if (within(i.module, "torch.ao") or within(i.module, "torchao"))
        and (i.top or file not in AO)
    ]
    assert not ours


def test_optional_packages_are_imported_where_they_are_needed() -> None:
    early = [
        f"torch_quant/{file}:{found.line} imports {found.module}"
        for file in FILES
        if file not in ADAPTERS
        for found in imports_of(file)
        if found.top and found.module.partition(".")[0] in OPTIONAL
    ]
    assert not early, "import it in the function that needs it"


def test_files_are_short() -> None:
    lines = {
        file: len((PACKAGE / file).read_text().splitlines()) for file in [*FILES, *OF_COMMANDS]
    }
    assert not {file: count for file, count in lines.items() if count > MOST_LINES}


def test_commands_import_what_is_slow_when_they_run() -> None:
    """So ``--help`` and a shell that completes a word need not wait for PyTorch."""
    quick = {*sys.stdlib_module_names, "click", "torch_quant_cli"}
    slow = [
        f"{file}:{found.line} imports {found.module}"
        for file in OF_COMMANDS
        for found in imports_of(file)
        if found.top and found.module.partition(".")[0] not in quick
    ]
    assert not slow, "import it in the function that needs it"


def test_the_package_knows_nothing_of_its_commands() -> None:
    assert not [
        f"torch_quant/{file}:{found.line}"
        for file in FILES
        for found in imports_of(file)
        if within(found.module, COMMANDS.name)
    ]


def test_nothing_prints() -> None:
    prints = [
        f"torch_quant/{file}:{node.lineno}"
        for file in [*FILES, *OF_COMMANDS]
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not prints, "use logging.getLogger('torch_quant'), or click.echo in a command"


def words_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every identifier and string in code, with its line; docstrings are no code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    fields = ("id", "attr", "name", "asname", "arg", "module", "names", "value")
    for node in ast.walk(tree):
        for found in (getattr(node, field, None) for field in fields):
            for each in found if isinstance(found, list) else [found]:
                if isinstance(each, str):
                    yield getattr(node, "lineno", 0), each


@cache
def words_in(file: str) -> list[tuple[int, str]]:
    """Those of a file of the package; its tree is not kept, which docstrings are taken out of."""
    return [*words_of(ast.parse((PACKAGE / file).read_text()))]


def rooms_of(file: str) -> set[str]:
    """The runtimes that a file may name."""
    rooms = {name for start, name in FORMATS.items() if file.startswith(start)}
    room = file.split("/")[1] if file.startswith("backends/") and file.count("/") > 1 else ""
    rooms |= {room} & BACKENDS.keys()
    rooms |= {reader for reader, form in READERS.items() if form in rooms}
    return rooms | ({READERS[room]} if room in READERS else set())


def backends_named(file: str, found: Iterable[tuple[int, str]]) -> list[str]:
    """What code of ``file`` says of runtimes whose rooms it is not in."""
    words = BACKENDS.keys() - rooms_of(file)
    return [
        f"torch_quant/{file}:{line}: {text!r}"
        for line, text in found
        if any(word in text.lower() for word in words)
    ]


def test_code_names_no_backend_outside_of_its_room() -> None:
    """What only one runtime wants stands in its room, or is a fact that each backend has."""
    found = [
        place
        for file in FILES
        if file not in REGISTRY
        for place in backends_named(file, words_in(file))
    ]
    assert not found, "\n".join(found)


KNOWN_BY = {
    "lstm(?!cell)": {
        "ops/recurrent.py", "ops/stepping.py", "ops/whole.py", "native/recurrent.py",
        "backends/ipex/lstm.py", "backends/onnx/program/recurrent.py",
    },
    "embedding_?bag|bags_of_rows|_bag": {
        "ops/embedding_bags.py", "backends/ipex/bags.py", "backends/onednn/tables.py",
    },
    "smooth_?quant": {"algorithms/smoothquant.py"},
}  # fmt: skip
"""What only its own files may know -> these; others import it, in lists of everything there is."""
LISTS = {
    "__init__.py", "algorithms/__init__.py", "ops/__init__.py", "recipes.py",
    "backends/ipex/verify.py", "amp/treatments.py",
}  # fmt: skip
"""Files that list operators, kernels, methods, recipes or treatments."""
MENTIONS = {
    "config.py", "io/summary_schema.py", "migrate/inc.py", "migrate/inc_static.py",
}  # fmt: skip
"""A message with an example; files of earlier versions, when there was one transform; what another
tool calls its methods."""


@pytest.mark.parametrize("words", KNOWN_BY)
def test_an_operator_or_method_is_known_by_its_own_files(words: str) -> None:
    """What it is, and a kernel or a form of it for each runtime that has one.

    A recurrent layer is captured in a way of its own, and quantized in two.
    """
    naming = {
        file
        for file in FILES
        for _, text in words_in(file)
        if re.search(words, text, re.IGNORECASE)
    }
    assert naming - LISTS - MENTIONS == KNOWN_BY[words]
    assert len(KNOWN_BY[words]) <= (6 if "lstm" in words else 3)


def test_the_reader_of_backends_names_sees_all_kinds() -> None:
    source = '"""of onnx"""\nimport a.ipex\n'
    for line in ("from .onnx import f", "x = 'onnxruntime'", "f(ipex=1)", "y.ONEDNN", "global Onnx",
                 "def g(ipex): 1", "class Openvino: 1"):  # fmt: skip
        source += f"{line}\n"

    def named(file: str, source: str) -> list[str]:
        return backends_named(file, words_of(ast.parse(source)))

    assert [hit.split(":")[1] for hit in sorted(named("graph/made_up.py", source))] == [*"23456789"]
    assert not named("io/onnx.py", "onnx = 1")
    assert named("io/onnx.py", "ipex = 1")
    assert not named("backends/ipex/made_up.py", "ipex = 1")
    assert named("backends/ipex/made_up.py", "onednn = 1")
    for known in ("onnx = 1", "onnxruntime = 1", "import openvino"):
        assert not named("backends/onnx/made_up.py", known)
    for known in ("onnx = 1", "from torch_quant.backends.onnx import x", "openvino = 1"):
        assert not named("backends/openvino/made_up.py", known)
    assert named("backends/openvino/made_up.py", "onnxruntime = 1")
    assert named("backends/onnxruntime/made_up.py", "openvino = 1")
    assert not named("backends/onnxruntime/made_up.py", "onnxruntime = 1")


def test_the_reader_of_imports_sees_all_kinds() -> None:
    """The rules above are worth what this function finds."""
    source = """
import onnx
import torch.ao.quantization as q
from torch_quant.core import spec
from . import sites
from ..backends.base import Backend
from .. import model
if True:
    import tabulate
if TYPE_CHECKING:
    import sklearn
class A:
    import tqdm
    def f(self):
        from torch.ao import quantization
        g = lambda: __import__("x")
def h():
    def inner():
        import matplotlib.pyplot
"""
    found = {(i.module, i.top) for i in imports_of("graph/made_up.py", ast.parse(source))}
    assert found == {
        ("onnx", True),
        ("torch.ao.quantization", True),
        ("torch_quant.core.spec", True),
        ("torch_quant.graph.sites", True),
        ("torch_quant.backends.base.Backend", True),
        ("torch_quant.model", True),
        ("tabulate", True),
        ("sklearn", False),
        ("tqdm", True),
        ("torch.ao.quantization", False),
        ("matplotlib.pyplot", False),
    }


PROBE = """
import sys
import torch
before = set(sys.modules)
import torch_quant
print("\\n".join(sorted(set(sys.modules) - before)))
"""


def test_importing_the_package_is_light() -> None:
    """Nothing of what is slow in torch beyond what it imports itself, and no optional package."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert "torch_quant.quantizer" in loaded
    slow = ("torch.ao", "torchao", "torch._dynamo", "torch._inductor", "torch.export", "sympy")
    assert not [name for name in loaded if any(within(name, each) for each in slow)]
    assert not {name.partition(".")[0] for name in loaded} & OPTIONAL
