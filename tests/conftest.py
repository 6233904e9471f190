"""Everything runs on one thread: the models are tiny, and threads only wait for each other."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
from collections.abc import Iterator

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each import starts processes
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import pytest
import torch
from capturing_once import shared_exports
from thinning import LONG, MARKS, left_out

from torch_quant import native
from torch_quant.ops.decomposed import decomposed

ONLY_IPEX = os.environ.get("ONLY_IPEX", "").split()
"""Files of which the tests on IPEX are run and no others."""


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", mark)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what another torch runs as well, and what is for the long run."""
    left = {each for each in items if _elsewhere(each, config)}
    if not LONG:
        left |= left_out([each for each in items if each not in left])
    if left:
        config.hook.pytest_deselected(items=[*left])
        items[:] = [each for each in items if each not in left]


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: no collection of garbage need look at them.

    A capture makes many small objects that stay; looking for garbage every 700 of them takes a
    tenth of its time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def _elsewhere(item: pytest.Item, config: pytest.Config) -> bool:
    file = item.path.relative_to(config.rootpath).as_posix()
    return file in ONLY_IPEX and "ipex" not in item.name


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def operators_of_onnx_once() -> Iterator[None]:
    """PyTorch's exporter reads the forms of all operators at each export, two seconds long."""
    if importlib.util.find_spec("onnxscript") is None:
        yield
        return
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = functools.cache(ONNXRegistry.from_torchlib)

    def copied(*args: int, **kwargs: int) -> ONNXRegistry:
        decomposed()  # forms of operators that are not defined yet would be left out
        new, known = ONNXRegistry(), read(*args, **kwargs)
        vars(new).update(vars(known))
        new.functions = {target: [*forms] for target, forms in known.functions.items()}
        return new

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copied))
        yield


CAPTURES = ("tests/graph/", "tests/test_threads.py")
"""Tests of captures themselves, which are made anew there."""
USES = ("tests/graph/test_annotate.py", "tests/graph/test_macs.py", "tests/graph/test_rules.py")
"""Tests beside them of what is done with captures."""


@pytest.fixture(autouse=True)
def exported_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """A model that another test has captured on an equal call is not exported again."""
    name = request.node.nodeid
    if name.startswith(CAPTURES) and not name.startswith(USES):
        yield
        return
    with shared_exports():
        yield


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """Inference, unless a test says otherwise."""
    with torch.no_grad():
        yield


@pytest.fixture(params=native.instruction_sets() or [None])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this CPU in turn; once without kernels if no library is built."""
    if request.param is None:
        yield "none"
        return
    with native.using(request.param):
        yield request.param


@pytest.fixture
def grad(no_grad: None) -> Iterator[None]:
    """For modules of tests that train: against :func:`no_grad`."""
    with torch.enable_grad():
        yield
