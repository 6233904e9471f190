"""The locks hold what setup.cfg asks for, exactly, by hash, and without a place to take it from."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ("core.txt", "ipex.txt")
BESIDE = ("accuracy.txt", "llm.txt", "peers.txt")
"""Installed into a folder of their own, without what they ask for."""


def _locked(name: str) -> dict[str, tuple[str, bool]]:
    """Version of each package for this Python and platform, and whether hashes follow it."""
    lines = (ROOT / "requirements" / name).read_text().replace("\\\n", "").splitlines()
    locked = {}
    for line in (line for line in lines if not line.startswith(("#", " "))):
        pin, _, hashes = line.partition("--hash=")
        requirement = Requirement(pin)
        if requirement.marker is None or requirement.marker.evaluate():
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            locked[canonicalize_name(requirement.name)] = specifier.version, bool(hashes)
    return locked


def _asked(*extras: str) -> list[Requirement]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    asked = setup["options"]["install_requires"]
    asked += "".join(setup["options.extras_require"][extra] for extra in extras)
    return [Requirement(line) for line in asked.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize(
    ("names", "extras"),
    [
        (("core.txt", "torch.txt"), ("onnx", "plot", "yaml", "examples", "dev")),
        (("ipex.txt",), ("onnx", "ipex", "plot", "yaml", "examples", "dev")),
    ],
    ids=LOCKS,
)
def test_lock_holds_what_setup_asks_for(names: tuple[str, ...], extras: tuple[str, ...]) -> None:
    locked = {package: pin for name in names for package, pin in _locked(name).items()}
    for requirement in _asked(*extras):
        version, _ = locked.get(canonicalize_name(requirement.name), ("nothing", False))
        assert version in requirement.specifier, (
            f"setup.cfg asks for {requirement}, {names[0]} holds {version}: run `make lock`"
        )


@pytest.mark.parametrize("name", [*LOCKS, *BESIDE, "docs.txt", "audit.txt"])
def test_each_file_is_known_by_its_hash(name: str) -> None:
    assert [package for package, (_, hashed) in _locked(name).items() if not hashed] == []


def test_locks_agree_on_what_torch_needs() -> None:
    core, torch = _locked("core.txt"), _locked("torch.txt")
    shared = core.keys() & torch.keys()
    assert {"sympy", "filelock"} <= shared
    assert {name: core[name][0] for name in shared} == {name: torch[name][0] for name in shared}
    assert not any(name.startswith(("nvidia", "cuda", "triton")) for name in core)


@pytest.mark.parametrize("lock", BESIDE)
def test_what_is_installed_beside_holds_nothing_that_the_environment_holds(lock: str) -> None:
    others = _locked("core.txt") | _locked("torch.txt")
    asked = (ROOT / "requirements" / lock).with_suffix(".in").read_text().splitlines()
    names = {Requirement(line).name for line in asked if not line.startswith("#")}
    assert _locked(lock).keys() == names
    assert not names & others.keys()


@pytest.mark.parametrize("name", [*LOCKS, *BESIDE, "docs.txt", "audit.txt", "torch.txt"])
def test_lock_names_no_host(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text()
    assert "://" not in text
    assert "index-url" not in text
    assert "find-links" not in text
