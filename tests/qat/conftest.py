"""Training: with gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def grad(no_grad: None) -> Iterator[None]:
    """Against the fixture of all tests, which turns gradients off."""
    with torch.enable_grad():
        yield
