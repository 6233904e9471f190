"""Packages of the locks have licences that are allowed, and others are refused by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("licenses", ROOT / "requirements" / "licenses.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_locked_and_installed_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert script().main([ROOT / "requirements" / "core.txt"]) == 0
    said = capsys.readouterr().out
    assert int(said.split()[0]) > 50
    assert "not allowed" not in said


LICENCES = [
    ("MIT", True, True),
    ("Apache-2.0 WITH LLVM-exception AND BSD-3-Clause", True, True),
    ("GPL-3.0-or-later OR MIT", True, True),
    ("GPL-3.0-or-later", True, False),
    ("LicenseRef-Proprietary", True, False),
    ("BSD License", False, True),
    ("MIT License; GNU General Public License v3 (GPLv3)", False, False),
    ("Limited", False, False),  # no "mit"
    ("", False, False),
]


@pytest.mark.parametrize(("licence", "expression", "fine"), LICENCES)
def test_licences(licence: str, expression: bool, fine: bool) -> None:
    assert script().allowed("package", licence, expression=expression) is fine


def test_a_package_of_another_licence_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = tmp_path / "copied-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: copied\nLicense: GPLv3\n")
    lock = tmp_path / "lock.txt"
    lock.write_text("copied==1.0 ; python_version < '4' \\\n    --hash=sha256:0\nabsent-one==2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert script().main([lock]) == 1
    said = capsys.readouterr().out
    assert "not allowed: copied: GPLv3; ask for another package" in said
    assert "not installed here, so not known: absent-one" in said
