"""The recipes of CONTRIBUTING.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from extending import kept_registries

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
PRINTED = """100.0% of the multiply-accumulates in int8, 1 of 1 sites
torch.Size([2, 4])
{'version': 1, 'backend': 'reference', 'qconfig': {'method': {'name': 'clipped', 'share': 0.8}}}
{'merge_rectifiers': 1}
"""


def test_every_recipe_runs(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {"__name__": __name__}
    with kept_registries(), torch.enable_grad():  # as a reader has it
        for block in BLOCKS:
            exec(block, namespace)
    assert len(BLOCKS) == 4
    assert capsys.readouterr().out == PRINTED


def test_what_it_names_exists() -> None:
    for path in re.findall(r"`((?:torch_quant|tests|docs)/[\w./]*)`", TEXT):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
