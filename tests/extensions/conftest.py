"""What an extension registers is gone after its test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from extending import kept_registries


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    with kept_registries():
        yield
