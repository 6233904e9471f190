"""What must hold of any model on any backend."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import BACKENDS, QUICK, assert_unchanged, equal, snapshot
from onnx_files import session
from programs import Program
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torch_quant
from torch_quant import (
    Backend,
    PerChannel,
    QConfig,
    QuantError,
    Quantizer,
    QuantSpec,
    UnsupportedOp,
    export_onnx,
    recipes,
    sqnr,
)
from torch_quant.backends import ReferenceBackend

__all__ = ["PROMISES"]

Inputs = tuple[Tensor, ...]
REFUSED = (RuntimeError, IndexError, ValueError, QuantError)
"""What models, and quantized ones, say of inputs that they do not take."""
OTHER = 7
"""Rows of the two batches together, at most."""


def call(model: nn.Module, inputs: Inputs) -> Any:
    return model(*(x.clone() for x in inputs))


def same(found: Any, expected: Any) -> bool:
    left, right = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    return left[1] == right[1] and all(
        x.dtype == y.dtype and x.shape == y.shape and equal(x, y)
        for x, y in zip(left[0], right[0], strict=True)
    )


def close(found: Any, expected: Any) -> float:
    """Decibels, without limit where both are as good as nothing."""
    for x, y in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    return sqnr(expected, found)


class Started:
    """A model, its inputs, and a quantizer that has seen two batches, and rows of both as one."""

    def __init__(self, program: Program, qconfig: QConfig | None = None) -> None:
        self.model, self.inputs = program.build()
        self.before = snapshot(self.model)
        self.quantizer = Quantizer("reference", qconfig=qconfig or QConfig(observer="minmax"))
        self.calib_model = self.quantizer.calib(self.model)
        self.seen = [self.inputs(batch, salt) for salt, batch in enumerate(program.batches)]
        rows = [torch.cat(each)[:OTHER] for each in zip(*self.seen, strict=True)]
        self.other = tuple(rows)
        # Seen too: where rows are mixed (x - x.mean(0)), its ranges are not those of its rows.
        for inputs in (*self.seen, self.other):
            assert same(call(self.calib_model, inputs), call(self.model, inputs)), "calib is float"

    def calls(self) -> list[Inputs]:
        """Two sizes of batches, of which the second was not what the graph was captured for."""
        return [self.seen[0], self.other]

    def strange(self) -> list[Inputs]:
        """Batches and lengths that no call had; the model may refuse some."""
        one, four = self.inputs(1, 3), self.inputs(4, 4)
        return [one, four, *(resized(four, dim, step) for dim in (1, -1) for step in (1, -1))]


def resized(inputs: Inputs, dim: int, step: int) -> Inputs:
    """Each image and sequence is longer or shorter by one along a dimension."""

    def changed(x: Tensor) -> Tensor:
        if x.dim() < 3 or x.shape[dim] + step < 1:
            return x
        return (
            x.narrow(dim, 0, x.shape[dim] - 1)
            if step < 0
            else torch.cat([x, x], dim).narrow(dim, 0, x.shape[dim] + 1)
        )

    return tuple(map(changed, inputs))


def in_another_thread(model: nn.Module, inputs: Inputs) -> Any:
    found: list[Any] = []

    def run() -> None:
        with torch.no_grad():
            found.append(call(model, inputs))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found, "the thread ended with an error"
    return found[0]


def check_proxy(program: Program) -> Started:
    """Calibration gives the float model's outputs, at sizes of all kinds, and leaves it alone."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        started = Started(program)
        for batch, salt in ((1, 3), (4, 4), (3, 1)):
            inputs = started.inputs(batch, salt)
            try:
                expected = call(started.model, inputs)
            except (RuntimeError, IndexError):  # [1:] of one row may leave nothing
                with pytest.raises((RuntimeError, IndexError, QuantError)):
                    call(started.calib_model, inputs)
                continue
            assert same(call(started.calib_model, inputs), expected), batch
    assert "Traceback" not in printed.getvalue(), printed.getvalue()
    assert_unchanged(started.model, started.before)
    return started


def check_sixteen_bits(program: Program) -> None:
    """With grids this fine, what is quantized is the float model: all that is left is mistakes."""
    fine = QConfig(
        QuantSpec.of("uint16"), QuantSpec.of("int16", granularity=PerChannel()), observer="minmax"
    )
    started = Started(program, fine)
    quantized = started.quantizer.quantize(started.model, backend="reference")
    for inputs in started.calls():
        ratio = close(call(quantized, inputs), call(started.model, inputs))
        assert ratio > 40.0, f"{ratio:.1f} dB at 16 bits"


def check_backend(started: Started, name: str) -> None:
    """What it computes is what was simulated, and as good; it can be copied, saved and loaded."""
    model, quantizer, backend = started.model, started.quantizer, Backend.get(name)
    try:
        simulated = quantizer.quantize(model, backend=ReferenceBackend(backend))
        real = quantizer.quantize(model, backend=backend)
    except UnsupportedOp as error:  # the layers may all be behind what is written to in place
        if not str(error).startswith("nothing in the model can be quantized"):
            raise
        return
    for inputs in started.calls():
        expected = call(model, inputs)
        found, simulation = call(real, inputs), call(simulated, inputs)
        check_as_good(name, found, simulation, expected)
        assert same(call(copy.deepcopy(real), inputs), found), f"{name}: a copy"
        assert same(call(real, inputs), found), f"{name}: twice"
        assert same(in_another_thread(real, inputs), found), f"{name}: in another thread"
    with tempfile.TemporaryDirectory() as folder:
        torch_quant.save(real, folder)
        loaded = torch_quant.load(folder, model=model)
    for inputs in started.calls():
        assert same(call(loaded, inputs), call(real, inputs)), f"{name}: loaded"
    assert_unchanged(model, started.before)


def check_as_good(name: str, found: Any, simulation: Any, expected: Any) -> None:
    """It is as near to the float outputs as what was simulated, or to that itself.

    Sums in another order round a few codes otherwise. Of outputs as small as these, one code more
    or less is 1 or 2 dB; a mistake is all of it.
    """
    ratio, bound = close(found, expected), close(simulation, expected)
    agreed = close(found, simulation)
    assert ratio >= bound - 3.0 or agreed > 30.0, (
        f"{name}: {ratio:.1f} dB, simulated {bound:.1f}, agreed {agreed:.1f}"
    )


def check_export(started: Started) -> None:
    """An ONNX file gives in onnxruntime what it was written from."""
    real = started.quantizer.quantize(started.model, backend="onnx")
    first, other = started.calls()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(real, first, path, progress=False)
        loaded = session(path)
    free = any(isinstance(size, str) for each in loaded.get_inputs() for size in each.shape)
    for inputs in (first, other) if free else (first,):
        feed = {each.name: inputs[int(each.name[1:])].numpy() for each in loaded.get_inputs()}
        found = [torch.from_numpy(each) for each in loaded.run(None, feed)]
        simulation, expected = (
            pytree.tree_leaves(call(each, inputs)) for each in (real, started.model)
        )
        check_as_good("the file", found, simulation, expected)


def check_amp(started: Started) -> None:
    """Looking for noise gives the float outputs, and scores that are numbers."""
    amp_model = started.quantizer.amp(started.model)
    for inputs in started.calls():
        assert same(call(amp_model, inputs), call(started.model, inputs)), "amp is float"
    for site in started.quantizer.sensitivity(amp_model):
        assert 0.0 <= site.score < math.inf, site
    assert_unchanged(started.model, started.before)


def check_strange_sizes(program: Program, name: str) -> None:
    """At sizes that were not calibrated it is what was simulated, and so are copies; or all refuse.

    Ranges are those of other batches, so only the simulation says how good it may be.
    """
    started, backend = Started(program), Backend.get(name)
    model, quantizer = started.model, started.quantizer
    simulated = quantizer.quantize(model, backend=ReferenceBackend(backend))
    real = quantizer.quantize(model, backend=backend)
    before = [call(real, inputs) for inputs in started.calls()]
    with tempfile.TemporaryDirectory() as folder:
        torch_quant.save(real, folder)
        loaded = torch_quant.load(folder, model=model)
    copied = copy.deepcopy(real)
    for inputs in started.strange():
        try:
            expected = call(model, inputs)
        except (*REFUSED, AssertionError):  # nn.MultiheadAttention asserts
            with contextlib.suppress(*REFUSED, AssertionError):
                call(real, inputs)
            continue
        found = call(real, inputs)
        check_as_good(name, found, call(simulated, inputs), expected)
        assert same(in_another_thread(real, inputs), found), f"{name}: in another thread"
        assert same(call(copied, inputs), found), f"{name}: a copy"
        with contextlib.suppress(QuantError):  # it has the graphs that were saved, and no more
            assert same(call(loaded, inputs), found), f"{name}: loaded"
    for inputs, found in zip(started.calls(), before, strict=True):
        assert same(call(real, inputs), found), f"{name}: afterwards"
    assert_unchanged(model, started.before)


def check_fallback(program: Program, dtype: torch.dtype) -> None:
    """What falls back is told, and the rest is what was simulated; all in float is float."""
    started = Started(program)
    quantizer, model = started.quantizer, started.model
    amp_model = quantizer.amp(model)
    for inputs in started.calls():
        call(amp_model, inputs)
    sites = len(quantizer.sensitivity(amp_model))
    left = quantizer.fallback(amp_model, num=1, dtype=dtype)
    assert bool(left) == bool(sites)
    check_backend(started, "onednn")
    if dtype is torch.float32:
        while quantizer.fallback(amp_model, num=1):
            pass
        for name in ("reference", "onednn"):
            nothing = quantizer.quantize(model, backend=name)
            for inputs in started.calls():
                assert close(call(nothing, inputs), call(model, inputs)) > 60.0, name


def check_recipe(program: Program, recipe: Callable[[], QConfig]) -> None:
    """Formats without ranges need no data, and are computed as they are simulated."""
    started = Started(program, recipe())
    check_backend(started, "onednn")
    model, first = started.model, started.calls()[0]
    unseen = Quantizer("onednn", qconfig=recipe()).quantize(model, example_inputs=first)
    simulated = started.quantizer.quantize(model, backend=ReferenceBackend(Backend.get("onednn")))
    for inputs in started.calls():
        found, simulation = call(unseen, inputs), call(simulated, inputs)
        check_as_good("onednn", found, simulation, call(model, inputs))


def everything(program: Program) -> None:
    started = check_proxy(program)
    for name in BACKENDS:
        if name != "ipex":
            check_backend(started, name)
    check_amp(started)


PROMISES: dict[str, Callable[[Program], None]] = {
    "everything": everything,
    "sixteen bits": check_sixteen_bits,
    "strange sizes": partial(check_strange_sizes, name="onednn"),
    "fallback": partial(check_fallback, dtype=torch.float32),
    "bfloat16 fallback": partial(check_fallback, dtype=torch.bfloat16),
    "bfloat16": partial(check_recipe, recipe=recipes.bfloat16),
    "int8_dynamic": partial(check_recipe, recipe=recipes.int8_dynamic),
    "int8_weight_only": partial(check_recipe, recipe=recipes.int8_weight_only),
    "an ONNX file": lambda program: check_export(check_proxy(program)),
    **{
        name: partial(lambda program, name: check_backend(check_proxy(program), name), name=name)
        for name in QUICK
    },
}
"""By name: each takes a program, and raises where it is not kept."""
