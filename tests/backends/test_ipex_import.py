"""IPEX that does not load is an unavailable backend, with the cause and what to install."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from thinning import rarely

from torch_quant import Backend, BackendUnavailable, Quantizer

TRIES = """
import torch
from torch_quant import Backend, Quantizer, available_backends
from torch_quant.errors import BackendUnavailable

model, x = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval(), torch.randn(4, 8)

def told(do):
    try:
        do()
    except BackendUnavailable as error:
        return str(error)
    raise AssertionError("nothing raised")

def of_ipex():
    quantizer = Quantizer(backend="ipex")
    quantizer.calib(model)(x)
    quantizer.quantize(model)

first = told(of_ipex)
assert told(of_ipex) == first, (told(of_ipex), first)
assert Backend.IPEX.unavailable() in first
assert "ipex" not in [backend.name for backend in available_backends()]

quantizer = Quantizer(backend="reference")
quantizer.calib(model)(x)
assert "does not run here" in told(lambda: quantizer.quantize(model, backend="ipex"))
quantizer.quantize(model)(x)  # the calibration is still good
print(first)
"""


def _installed(folder: Path, package: str, version: str | None, code: str = "") -> None:
    if code:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(code)
    if version:
        info = folder / f"{package}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )


def _release() -> str:
    """The release of IPEX that this torch would need."""
    return ".".join([*torch.__version__.split(".")[:2], "0"])


@pytest.mark.parametrize(
    ("code", "version", "quoted"),
    [
        rarely(
            "MoeModelOutput",
            True,
            "NameError: name 'MoeModelOutput' is not defined",
        ),
        ("exit('no AVX2')", False, "SystemExit: no AVX2"),
    ],
    ids=["name", "exit_without_metadata"],
)
def test_an_import_that_fails_is_quoted(
    code: str, version: bool, quoted: str, tmp_path: Path
) -> None:
    _installed(tmp_path, "intel_extension_for_pytorch", _release() if version else None, code)
    _installed(tmp_path, "transformers", "5.23.0")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", TRIES],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert quoted in done.stdout
    assert "pip install torch==2.8.0 intel-extension-for-pytorch==2.8.0" in done.stdout


def test_transformers_that_ipex_does_not_import_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(tmp_path, "intel_extension_for_pytorch", _release(), "1 / 0")
    _installed(tmp_path, "transformers", "5.24.0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendUnavailable, match=r"fails beside 5\.24 .*, this is 5\.24\.0; in an"):
        Quantizer(backend="ipex")
    assert "'transformers<5.24'" in (Backend.IPEX.unavailable() or "")


def test_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(tmp_path, "intel_extension_for_pytorch", "1.13.100", "1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    assert f"1.13.100 needs torch 1.13, this is {torch.__version__}" in (
        Backend.IPEX.unavailable() or ""
    )


def test_it_runs_where_it_is_installed() -> None:
    """Else all tests of IPEX would be skipped, and nobody would know."""
    if importlib.util.find_spec("intel_extension_for_pytorch") is not None:
        assert Backend.IPEX.unavailable() is None
