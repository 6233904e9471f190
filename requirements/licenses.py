"""Under which licences is what the locks hold, as far as it is installed in this environment?

    python requirements/licenses.py requirements/core.txt requirements/torch.txt

Ends with 1 where a package has a licence that is not in the lists below, or tells none.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable
from email.message import Message
from pathlib import Path

__all__ = ["allowed", "locked", "main", "told"]

SPDX = frozenset({
    "0BSD", "APACHE-2.0", "BSD-2-CLAUSE", "BSD-3-CLAUSE", "BSL-1.0", "CC0-1.0", "CNRI-PYTHON",
    "HPND", "ISC", "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "PYTHON-2.0", "UNLICENSE", "ZLIB",
})  # fmt: skip
"""They ask for a notice; MPL-2.0 also for what is changed in its own files."""
NAMES = re.compile(
    r"\b(apache|bsd|isc|mit|mozilla public|mpl|psf|python software foundation|matplotlib)\b", re.I
)
"""How packages without an expression say so."""
REFUSED = re.compile(r"\b(a?gpl\w*|lgpl\w*|gnu|proprietary|commercial)\b", re.I)
PARTS_OF_TORCH = re.compile(r"(nvidia|cuda)-")
"""NVIDIA's own licence. PyTorch's builds for its GPUs ask for them; on a CPU nothing loads them."""
_PIN = re.compile(r"([A-Za-z0-9_.-]+)==[^ ;\\]+")


def locked(files: Iterable[Path]) -> list[str]:
    """Names of the packages of locks, each once."""
    lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return sorted({found[1].lower() for line in lines if (found := _PIN.match(line))})


def told(about: Message) -> str:
    """What a package's metadata say: an expression, or its first words and its classifiers."""
    if expression := about.get("License-Expression"):
        return str(expression)
    kinds = [x.split(" :: ")[-1] for x in about.get_all("Classifier", []) if x.startswith("Lic")]
    words = " ".join(str(about.get("License") or "").split())[:80]
    return "; ".join(each for each in (words, *kinds) if each)


def allowed(name: str, licence: str, *, expression: bool) -> bool:
    """Whether a package may be used.

    Args:
        name: of the package.
        licence: what :func:`told` gave.
        expression: whether that is one of SPDX.

    >>> allowed("a", "MIT AND (BSD-3-Clause OR GPL-2.0)", expression=True)
    True
    >>> allowed("a", "MIT AND GPL-2.0", expression=True), allowed("a", "", expression=False)
    (False, False)
    """
    if PARTS_OF_TORCH.match(name):
        return True
    if not expression:
        return bool(NAMES.search(licence)) and not REFUSED.search(licence)
    terms = licence.upper().replace("(", " ").replace(")", " ").split(" AND ")
    choices = ([each.split(" WITH ")[0].strip() for each in x.split(" OR ")] for x in terms)
    return all(any(each in SPDX for each in some) for some in choices)


def main(files: list[Path]) -> int:
    """Print what is not allowed and what is not here; 1 if anything is not allowed."""
    wrong, missing, fine = [], [], 0
    for name in locked(files):
        try:
            about = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        licence = told(about)
        if allowed(name, licence, expression=bool(about.get("License-Expression"))):
            fine += 1
        else:
            wrong.append(f"{name}: {licence or 'tells no licence'}")
    print(f"{fine} packages have a licence that is allowed")
    if missing:
        print(f"not installed here, so not known: {', '.join(missing)}")
    for each in wrong:
        print(f"not allowed: {each}; ask for another package, or list it in {Path(__file__).name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("give locks: python requirements/licenses.py requirements/core.txt")
    sys.exit(main([Path(each) for each in sys.argv[1:]]))
