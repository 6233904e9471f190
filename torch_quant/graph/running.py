"""Float modules run by the package: the same numbers at each run, and nothing left behind."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from torch_quant.core.switches import Off
from torch_quant.graph.calls import Call
from torch_quant.graph.effects import KeepsElsewhere, KeepsState, Watch, kept_between_calls
from torch_quant.graph.foreign import ForeignOperators
from torch_quant.graph.outputs import flatten_output
from torch_quant.graph.survivors import Survivors
from torch_quant.ops.capturing import running

__all__ = [
    "CAPTURING",
    "FirstRun",
    "Writes",
    "copied",
    "fastpath_wanted",
    "first_run",
    "frozen",
    "no_fastpath",
    "run_module",
    "seed",
    "written",
]

CAPTURING = threading.RLock()
"""Held while something is set for the whole process; ``torch.export`` is not thread-safe either."""
Writes = tuple[int | str, ...]
"""Positions and names of the arguments that a module changes."""


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Same random numbers in every run, no gradients, and the module as it was afterwards."""
    attributes = Watch({} if isinstance(module, fx.GraphModule) else {"": module})
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    owners = [
        (owner, dict(owner._buffers))
        for owner in module.modules()
        if not isinstance(owner, torch.jit.ScriptModule)
    ]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        seed()
        try:
            yield
        finally:
            attributes.restore()
            for owner, names in owners:
                owner._buffers.update(names)
            for buffer, saved in buffers:
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)


def seed() -> None:
    """The same random numbers from here on. PyTorch's own takes a millisecond without a GPU."""
    if torch.cuda.is_initialized():
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)


_FAST_PATH = Off(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled)


def fastpath_wanted() -> bool:
    """Whether it is enabled, but for our own :func:`no_fastpath`."""
    return _FAST_PATH.wanted()


def no_fastpath() -> contextlib.AbstractContextManager[None]:
    """Attention modules compute by their own Linears, not by one opaque operator."""
    return _FAST_PATH


def copied(call: Call) -> Call:
    """The call on copies of its tensors: a model may write into its inputs."""
    return call.with_tensors(tuple(x.clone() for x in call.tensors))


def run_module(module: nn.Module, call: Call, grad: bool = False, writes: Writes = ()) -> list[Any]:
    """The float module's flat outputs for ``call``, without a trace on its inputs and itself.

    Args:
        module: in eval mode.
        call: what to call it with.
        grad: the grad mode it runs in, by which some modules choose their path.
        writes: arguments that it changes; what they become is part of the outputs.
    """
    with CAPTURING, frozen(module), running(), torch.set_grad_enabled(grad):
        return _run(module, call, writes)


def _run(module: nn.Module, call: Call, writes: Writes) -> list[Any]:
    args, kwargs = call.rebuild(copied(call).tensors)
    output = module(*args, **kwargs)
    return _detached(flatten_output(output, written(args, kwargs, writes))[0])


class FirstRun(NamedTuple):
    """What a module did when it was first called.

    Args:
        outputs: flat.
        writes: the arguments that it changed.
        left: attributes that it left behind.
    """

    outputs: list[Any]
    writes: Writes
    left: tuple[str, ...]


def first_run(module: nn.Module, call: Call) -> FirstRun:
    """Run the module and watch what it does.

    Raises:
        KeepsState: it reads what an earlier call of it left in an attribute, or leaves tensors
            where no attribute leads.
    """
    with frozen(module), running():
        args, kwargs = call.rebuild(copied(call).tensors)
        roots: dict[Any, Any] = dict(enumerate(args)) | kwargs
        watches = {key: Watch({str(key): x}, tensors=False) for key, x in roots.items()}
        state = Watch({"": module})
        output = module(*args, **kwargs)
        writes = tuple(key for key, watch in watches.items() if watch.changed())
        expected = _detached(flatten_output(output, written(args, kwargs, writes))[0])

        # The first run is not watched by it: Dynamo, which runs `torch.cond`, would remember.
        foreign = ForeignOperators()

        def again(with_others: bool) -> list[Any]:
            seed()
            if not with_others:  # comes first
                with foreign:
                    return _run(module, call, writes)
            changed = _shrunk if foreign.names else _flipped
            return _run(module, changed(call), writes)

        left = tuple(dict.fromkeys(state.changed()))
        if left and (kept := kept_between_calls(state, expected, again)):
            raise KeepsState(kept)
    if _keeps_elsewhere(module, call):
        raise KeepsElsewhere
    return FirstRun(expected, writes, left)


def _keeps_elsewhere(module: nn.Module, call: Call) -> bool:
    """Whether tensors of a call exist when its outputs and all attributes are gone.

    `torch.cond` runs by Dynamo, which would remember the mode that is entered here; so it is off.
    """
    made = Survivors()
    eager = torch.compiler.set_stance("force_eager")
    with frozen(module), running(), eager, made, contextlib.suppress(Exception):
        _run(module, call, ())
    return made.exist()


def _flipped(call: Call) -> Call:
    """The call with other values, as valid as its own and of the same shapes."""
    return call.with_tensors(tuple(x.flip(-1) if x.dim() else x for x in call.tensors))


def _shrunk(call: Call) -> Call:
    """The call with its floats a little closer to 0: an index among them stays in range.

    Raises:
        ValueError: a tensor of integers, any of which may be an index.
    """
    if any(x.dim() and not x.is_floating_point() for x in call.tensors):
        raise ValueError("no other integers are known to be valid inputs")
    return call.with_tensors(tuple(x * (1 - 2.0**-6) if x.dim() else x for x in call.tensors))


def written(args: tuple[Any, ...], kwargs: dict[str, Any], writes: Writes) -> dict[Any, Any]:
    return {key: args[key] if isinstance(key, int) else kwargs[key] for key in writes}


def _detached(leaves: list[Any]) -> list[Any]:
    return [x.detach() if isinstance(x, Tensor) else x for x in leaves]
