"""Everything runs on one thread: the models are tiny, and threads only wait for each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """Inference, unless a test says otherwise."""
    with torch.no_grad():
        yield
