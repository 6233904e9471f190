"""Any order of calls of a quantizer's public methods, and what must hold after each of them."""

from __future__ import annotations

import contextlib
import copy
import pickle
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
import torch
from flows import BACKENDS, Inputs, assert_unchanged, snapshot
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_models import SmallModel
from steps import (
    FILTERS,
    OVERRIDES,
    QCONFIGS,
    Event,
    Options,
    Saved,
    call,
    edit,
    plain,
    run,
    same,
)
from torch import Tensor, nn

from torch_quant import QuantError, Quantizer

__all__ = ["Sequences"]

TARGETS = [name for name in BACKENDS if name != "ipex"]  # which compiles each graph anew
SALTS = st.integers(0, 1)
KINDS = st.integers(0, 2)


MISTAKES: list[Callable[[Sequences], Any]] = [
    lambda self: self.calibrate_on_what_the_model_refuses(),
    lambda self: self.load_a_summary_that_is_none(),
    lambda self: self.quantizer.quantize(self.model, backend="abacus"),
    lambda self: self.quantizer.load_state_dict(None),  # type: ignore[arg-type]
    lambda self: self.quantizer.load_state_dict({"state": None, "model": None}),
    lambda self: self.quantizer.load_state_dict({"state": {}, "model": {}}),
    lambda self: self.quantizer.calib(torch.ones(2)),  # type: ignore[arg-type]
    lambda self: self.quantizer.amp(self.model, metric="taste"),
]


class Sequences(RuleBasedStateMachine):
    """One float model, one quantizer of it, and every quantized model made on the way."""

    small: ClassVar[SmallModel]
    model: ClassVar[nn.Module]

    @initialize(kind=KINDS, at_once=st.sampled_from([True, True, False]))
    def begin(self, kind: int, at_once: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()
        first = {key: x.clone() for key, x in self.model.state_dict().items()}
        other = {key: x * 1.25 if x.is_floating_point() else x for key, x in first.items()}
        self.versions, self.weights = (first, other), 0
        self.before = snapshot(self.model)
        self.quantizer = Quantizer("reference")
        self.options = Options()
        self.history: tuple[Event, ...] = ()
        self.fallen: dict[str, str] = {}
        self.called: dict[int, int] = {}  # kind of call -> salt of the first of it
        self.saved: list[Saved] = []
        self.summaries: list[Path] = []
        self.made: list[tuple[nn.Module, list[tuple[Inputs, list[Tensor]]]]] = []
        self.calib_model = self.amp_model = None
        if at_once:
            self.calibrate(kind, 0, True, False)

    # Proxies

    @rule(kind=KINDS, salt=SALTS, anew=st.booleans(), in_thread=st.booleans())
    def calibrate(self, kind: int, salt: int, anew: bool, in_thread: bool) -> None:
        if self.calib_model is None or anew:
            self.calib_model = self.quantizer.calib(self.model)
        inputs = self.inputs(kind, salt)
        expected = call(self.model, inputs)
        found = run(lambda: call(self.calib_model, inputs), in_thread)
        assert same(found, expected)
        self.called.setdefault(kind, salt)
        self.history = (*self.history, Event(self.options, self.weights, kind, salt))

    @precondition(lambda self: self.history)
    @rule(kind=KINDS, salt=SALTS, anew=st.booleans())
    def look_for_noise(self, kind: int, salt: int, anew: bool) -> None:
        inputs = self.inputs(kind, salt)
        expected = call(self.model, inputs)
        with self.refusals():
            if self.amp_model is None or anew:
                self.amp_model = self.quantizer.amp(self.model)
            assert same(call(self.amp_model, inputs), expected)
            self.called.setdefault(kind, salt)

    @precondition(lambda self: self.amp_model is not None)
    @rule(num=st.integers(1, 2))
    def fall_back(self, num: int) -> None:
        with self.refusals():
            names = self.quantizer.fallback(self.amp_model, num)
            self.fallen |= dict.fromkeys(names, "float32")
            assert not set(names) & set(self.quantizer.plan.quantized)
        assert self.quantizer.fallen_back == self.fallen

    @precondition(lambda self: self.fallen)
    @rule()
    def forget_fallback(self) -> None:
        self.quantizer.reset_fallback()
        self.fallen = {}

    # Quantizing

    @rule(backend=st.sampled_from(TARGETS))
    def quantize(self, backend: str) -> None:
        """As a new quantizer does that has seen the same batches in the same order."""
        found = self.attempt(self.quantizer, backend)
        expected = self.attempt(self.again(), backend)
        if isinstance(found, QuantError) or isinstance(expected, QuantError):
            assert type(found) is type(expected), (found, expected)
            return
        outputs = []
        for kind, salt in self.called.items():
            inputs = self.inputs(kind, salt)
            values = self.served(found, inputs)
            assert values is None or same(values, call(expected, inputs))
            if values is not None:
                outputs.append((inputs, values))
        self.made.append((found, outputs))
        self.compare_coverage(found, backend)

    @rule(kind=KINDS, salt=SALTS, backend=st.sampled_from(TARGETS))
    def calibrate_and_quantize(self, kind: int, salt: int, backend: str) -> None:
        self.calibrate(kind, salt, False, False)
        self.quantize(backend)

    def attempt(self, quantizer: Quantizer, backend: str) -> Any:
        try:
            with self.refusals(quantizer, reraise=True):
                return quantizer.quantize(self.model, backend=backend)
        except QuantError as error:
            return error

    def served(self, quantized: nn.Module, inputs: Inputs) -> list[Tensor] | None:
        """Its outputs; None where it says that it was not made for such inputs."""
        with contextlib.suppress(QuantError):
            return call(quantized, inputs)
        return None

    def compare_coverage(self, quantized: nn.Module, backend: str) -> None:
        report = self.quantizer.coverage(self.model, backend=backend)
        assert dict(report.plan) == dict(quantized.plan) == dict(self.quantizer.plan)
        counts = f"{len(report.plan.quantized)} of {len(report.plan)} sites"
        headline = str(report).splitlines()[0]
        for part in (counts, f"{report.share:.1%}"):
            assert part in headline
            assert part in quantized.description

    @precondition(lambda self: self.made)
    @rule(which=st.integers(0, 9), pickled=st.booleans())
    def copy_what_was_made(self, which: int, pickled: bool) -> None:
        quantized, outputs = self.made[which % len(self.made)]
        twin = pickle.loads(pickle.dumps(quantized)) if pickled else copy.deepcopy(quantized)
        for inputs, expected in outputs:
            assert same(call(twin, inputs), expected)
        self.made[which % len(self.made)] = (twin, outputs)

    @precondition(lambda self: self.made)
    @rule(which=st.integers(0, 9))
    def call_in_a_thread(self, which: int) -> None:
        quantized, outputs = self.made[which % len(self.made)]
        for inputs, expected in outputs:
            assert same(run(lambda inputs=inputs: call(quantized, inputs), True), expected)

    # Settings, states and weights

    @rule(
        qconfig=st.sampled_from(sorted(QCONFIGS)),
        overrides=st.sampled_from(OVERRIDES),
        module_filter=st.sampled_from(sorted(FILTERS)),
    )
    def set_options(self, qconfig: str, overrides: Any, module_filter: str) -> None:
        self.options = replace(
            self.options,
            qconfig=QCONFIGS[qconfig],
            overrides=overrides,
            module_filter=FILTERS[module_filter],
        )
        self.options.give(self.quantizer)

    @precondition(lambda self: len(self.saved) < 2)
    @rule()
    def save_state(self) -> None:
        state = copy.deepcopy(self.quantizer.state_dict())
        self.saved.append(Saved(state, self.history, dict(self.fallen)))

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 9))
    def load_state(self, which: int) -> None:
        saved = self.saved[which % len(self.saved)]
        self.quantizer.load_state_dict(copy.deepcopy(saved.state))
        self.history, self.fallen = saved.history, dict(saved.fallen)
        assert plain(self.quantizer.state_dict()) == plain(saved.state)

    @precondition(lambda self: len(self.quantizer.plan) > 0)
    @rule()
    def save_summary(self) -> None:
        path = Path(self.folder.name) / f"{len(self.summaries)}.json"
        with self.refusals():
            self.quantizer.save_summary(path)
            self.summaries.append(path)

    @precondition(lambda self: self.summaries)
    @rule(which=st.integers(0, 9))
    def load_summary(self, which: int) -> None:
        path = self.summaries[which % len(self.summaries)]
        with self.refusals():
            self.quantizer.load_summary(path)
            event = Event(self.options, self.weights, summary=path)
            self.history = (*self.history, event)
            self.options = replace(self.options, summary=path)

    @precondition(lambda self: self.history)
    @rule()
    def change_weights(self) -> None:
        self.give_weights(1 - self.weights)
        self.before = snapshot(self.model)

    # Mistakes

    @rule(mistake=st.sampled_from(MISTAKES))
    def make_a_mistake(self, mistake: Callable[[Sequences], None]) -> None:
        with self.refusals(expected=True):
            mistake(self)

    def calibrate_on_what_the_model_refuses(self) -> None:
        """Once captured, an operator may be what raises, as in the model."""
        calib_model = self.quantizer.calib(self.model)
        try:
            call(calib_model, self.small.refused)
        except (RuntimeError, IndexError) as error:
            raise QuantError(f"the model's own: {error}") from error

    def load_a_summary_that_is_none(self) -> None:
        path = Path(self.folder.name) / "other.json"
        path.write_text("[1, 2]")
        self.quantizer.load_summary(path)

    @contextlib.contextmanager
    def refusals(
        self, quantizer: Quantizer | None = None, expected: bool = False, reraise: bool = False
    ) -> Iterator[None]:
        """An error is the package's own, says something, and leaves everything as it was."""
        quantizer = quantizer or self.quantizer
        before = self.all_of(quantizer)
        raised: QuantError | None = None
        try:
            yield
        except QuantError as error:
            raised = error
        if raised is None:
            assert not expected
            return
        assert str(raised)
        assert self.all_of(quantizer) == before
        if reraise:
            raise raised

    @staticmethod
    def all_of(quantizer: Quantizer) -> Any:
        return plain(quantizer.state_dict()), quantizer.settings, dict(quantizer.plan)

    # What holds after each step

    @invariant()
    def the_model_is_as_it_was(self) -> None:
        if hasattr(self, "before"):
            assert_unchanged(self.model, self.before)

    @invariant()
    def what_was_made_last_still_gives_what_it_gave(self) -> None:
        for quantized, outputs in getattr(self, "made", [])[-1:]:
            for inputs, expected in outputs[:1]:
                assert same(call(quantized, inputs), expected)

    def teardown(self) -> None:
        if not hasattr(self, "before"):
            return
        try:
            for quantized, outputs in self.made:
                for inputs, expected in outputs:
                    assert same(call(quantized, inputs), expected)
        finally:
            self.give_weights(0)
            self.folder.cleanup()

    # The same once more

    def inputs(self, kind: int, salt: int) -> Inputs:
        return self.small.calls[kind](salt)

    def give_weights(self, version: int) -> None:
        self.model.load_state_dict(self.versions[version])
        self.weights = version

    def again(self) -> Quantizer:
        """A new quantizer with this one's settings that has seen what this one has seen."""
        now, seen = self.weights, Quantizer("reference")
        loaded: Path | None = None
        try:
            for event in self.history:
                self.give_weights(event.weights)
                event.options.give(seen)
                if event.options.summary != loaded:
                    loaded = event.options.summary
                    edit(seen, loaded)
                if event.summary is not None:
                    seen.load_summary(event.summary)
                    loaded = event.summary
                else:
                    call(seen.calib(self.model), self.inputs(event.kind, event.salt))
        finally:
            self.give_weights(now)
        quantizer = Quantizer("reference")
        self.options.give(quantizer)
        if self.options.summary is not None:
            quantizer.load_summary(self.options.summary)
        quantizer.load_state_dict(seen.state_dict() | {"fallback": dict(self.fallen)})
        for kind, salt in self.called.items():
            args, kwargs = self.inputs(kind, salt)
            quantizer.calib(self.model, kwargs or args)
        return quantizer
