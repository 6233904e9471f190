"""The wheel and the source archive, each in an empty environment, with and without a compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import torch_quant

ROOT = Path(__file__).parents[1]


def _build(what: str, folder: Path, source: Path = ROOT, **environment: str) -> Path:
    """The archive that setuptools makes of the sources, ``wheel`` or ``sdist``."""
    folder.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta as m; print(m.build_{what}({str(folder)!r}))"
    run = [sys.executable, "-c", code]
    done = subprocess.run(
        run, cwd=source, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")  # a build leaves its objects there
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (found,) = folder.iterdir()
    return found


class Environment:
    """A new environment that sees the packages of this one, but not what is installed editable."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        (packages,) = folder.glob("lib/*/site-packages")
        (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self._run("-m", "pip", "install", "--no-deps", "--quiet", str(wheel), cwd=folder)
        self.folder, self.packages = folder, packages

    def _run(self, *arguments: str, cwd: Path) -> str:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(
            [self.python, *arguments], cwd=cwd, env=clean, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, code: str) -> str:
        return self._run("-W", "ignore", "-c", code, cwd=self.folder)


FIRST = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
WHERE = """
import torch_quant; from torch_quant import native
print(torch_quant.__version__, torch_quant.__file__, native.unavailable())
"""


@pytest.mark.long("a build of the kernels")
def test_the_wheel_of_the_sources_runs_the_first_block(unpacked: Path, tmp_path: Path) -> None:
    wheel = _build("wheel", tmp_path / "wheel", unpacked)
    assert re.fullmatch(rf"torch_quant-{torch_quant.__version__}-py3-none-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "torch_quant/native/kernels.so" in names
    assert "torch_quant/py.typed" in names
    assert any(re.fullmatch(r"torch_quant/report/web/.*\.js", name) for name in names)
    assert {name.partition("/")[0] for name in names} == {
        "torch_quant", "torch_quant_cli", f"torch_quant-{torch_quant.__version__}.dist-info",
    }  # fmt: skip
    environment = Environment(tmp_path / "venv", wheel)
    version, place, why = environment.run(WHERE).split()
    assert (version, why) == (torch_quant.__version__, "None")
    assert Path(place).is_relative_to(environment.packages)
    assert "of the multiply-accumulates in int8" in environment.run(FIRST)
    command = environment.python.with_name("torch-quant")
    told = subprocess.run([command, "doctor"], capture_output=True, text=True, check=True).stdout
    assert torch_quant.__version__ in told


@pytest.mark.long("a build, and an environment")
def test_without_a_compiler(unpacked: Path, tmp_path: Path) -> None:
    wheel = _build("wheel", tmp_path / "wheel", unpacked, CC="none", CXX="none")
    with zipfile.ZipFile(wheel) as archive:
        assert "torch_quant/native/kernels.so" not in archive.namelist()
    environment = Environment(tmp_path / "venv", wheel)
    assert "not built" in environment.run(WHERE)
    assert "of the multiply-accumulates in int8" in environment.run(FIRST)


def test_the_version_is_the_same_everywhere() -> None:
    cited = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    changed = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert [*cited, changed[0]] == [torch_quant.__version__] * 2
