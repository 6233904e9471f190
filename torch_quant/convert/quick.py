"""Python code around quantized layers that one call of a kernel computes.

A decoder in pieces runs the user's own code between its layers: norms of some seven operators, and
blocks that are two or three layers with a function between. What such a module computes is
recorded at its first call, if its code is straight. Where that is one kernel of this package, it is
called from then on, and the module's own code wherever somebody looks closer: hooks, compilers,
gradients, other types.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as everywhere

from torch_quant.convert.reading import of_tensors
from torch_quant.convert.recording import recorded
from torch_quant.convert.straight import is_straight
from torch_quant.native.joint import GATED_LINEAR
from torch_quant.native.rms_norm import RMS_NORM
from torch_quant.nn.stand_in import StandIn
from torch_quant.ops.library import unwatched
from torch_quant.passes.base import PassContext
from torch_quant.passes.joint_products import join_gated
from torch_quant.passes.rms_norms import fuse_rms_norms

__all__ = ["QuickCall", "give_quick_calls"]

_KERNELS = (RMS_NORM, GATED_LINEAR)
_MOST_BELOW = 6
"""Modules inside of one whose code may be one kernel."""
_NEAR = 1e-3
"""Of the size of the results: so far may they be apart where numbers are rounded in between."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OWN_HOOKS = (*_HOOKS, "_backward_hooks", "_backward_pre_hooks")
_CALL = "_compiled_call_impl"
"""What a module has in the place of its call. No copy has it, so none runs the code of another."""
_AGAIN = "_torch_quant_quick"
"""What gives whole copies and pickles of a module one of their own."""
_PLAIN = (bool, int, float, str, type(None))
_FORWARD = operator.attrgetter("forward")


def give_quick_calls(glue: nn.Module) -> int:
    """Have modules try at their first call whether a kernel computes them; returns how many.

    Args:
        glue: a module whose Python code runs around quantized ones.
    """
    found = [module for module in _own(glue) if module is not glue and _may_be(module)]
    if not any(True for _ in glue.children()) and _may_be(glue):
        found.append(glue)
    for module in found:
        _Quick(module)
    return len(found)


def _own(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those below whose own Python runs."""
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, (StandIn, torch.jit.ScriptModule)):
            continue
        seen.add(id(each))
        yield each
        waiting += [child for child in each._modules.values() if child is not None]


def _may_be(module: nn.Module) -> bool:
    """Whether it is a norm with a weight, or little more than two or three quantized layers."""
    if isinstance(module, (torch.jit.ScriptModule, StandIn)):
        return False
    if "forward" in vars(module) or vars(module).get(_CALL) is not None:
        return False
    below = list(module.modules())[1:]
    if len(below) > _MOST_BELOW:
        return False
    layers = [each for each in below if isinstance(each, StandIn)]
    held = [x for x in module._parameters.values() if x is not None]
    if layers:
        return not held and len(layers) in (2, 3)
    return not below and len(held) == 1 and held[0].dim() == 1


class _Quick:
    """Makes a module quick, and a deep copy of it, when that is made.

    Of a shallow copy it is still the first module's, and does nothing.

    Args:
        module: which may have no attributes yet, as it is about to be filled.
    """

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        vars(module)[_CALL], vars(module)[_AGAIN] = QuickCall(module), self

    def __reduce__(self) -> Any:
        return _Quick, (self.module,)


class QuickCall:
    """The call of a module that may be one kernel call.

    Args:
        module: whose it is.
    """

    __slots__ = (
        "_facts",
        "_function",
        "_held",
        "_kinds",
        "_left",
        "_size",
        "module",
    )  # no dictionary to look into

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._function: Callable[..., Any] | None = None
        self._held: list[tuple[dict[str, Any], str]] = []
        self._kinds: list[Any] = []
        self._facts = _Facts(nn.Identity())
        self._left = False
        """Whether it only calls the module, which other threads may be calling through it."""
        self._size: tuple[int, tuple[int, ...]] = (0, ())
        """Dimensions of the input, and the last of them."""

    def __reduce__(self) -> Any:
        return _nothing, ()  # where a module's own __getstate__ gives it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._left:
            return self.module._call_impl(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling() or kwargs or len(args) != 1:
            if self._function is None and not torch.compiler.is_dynamo_compiling():
                self._leave()  # it takes more than one tensor
            return self.module._call_impl(*args, **kwargs)
        (x,) = args
        if type(x) is Tensor and x.dtype is torch.float32 and not _traced():
            if self._function is None:
                self._learn(x)
            function, facts = self._function, self._facts
            size = (x.dim(), x.shape[-1:])
            if function is not None and size == self._size and facts.hold():
                given: list[Any] = [entries.get(name) for entries, name in self._held]
                if list(map(_kind, given)) == self._kinds and unwatched([*given, x]):
                    return function(*given, x)
        return self.module._call_impl(x)

    def _leave(self) -> None:
        self._left = True

    def _learn(self, x: Tensor) -> None:
        """Find out what the module computes from rows of such a size."""
        facts = _Facts(self.module)
        if not x.dim() or not unwatched([x]) or not facts.hold():
            return
        if not is_straight(self.module):
            self._leave()
            return
        rows = torch.arange(2 * x.shape[-1], dtype=torch.float32).sin_().reshape(2, -1)
        found = _kernel_of(self.module, rows[(None,) * (x.dim() - 2)] if x.dim() > 2 else rows)
        if found is None:
            self._leave()
            return
        self._size, self._facts = (x.dim(), x.shape[-1:]), facts
        function, self._held = found
        self._kinds = [_kind(entries[name]) for entries, name in self._held]
        self._function = function


def _nothing() -> None:
    """What a copy of a module has."""


def _kernel_of(
    module: nn.Module, x: Tensor
) -> tuple[Callable[..., Any], list[tuple[dict[str, Any], str]]] | None:
    """What computes ``module`` in one call, of tensors and then the input; and where those are."""
    found = recorded(module, x)
    if found is None:
        return None
    graph, expected = found
    context = PassContext(fx.GraphModule({}, fx.Graph()))
    context.gm._graph = graph
    fuse_rms_norms(context)
    join_gated(context)
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if len(calls) != 1 or calls[0].target not in _KERNELS:
        return None
    targets = [str(node.target) for node in graph.find_nodes(op="get_attr")]
    places = []
    for target in targets:
        path, _, name = target.rpartition(".")
        owner = module.get_submodule(path)
        entries: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
        places.append((entries, name))
    function = of_tensors(graph, targets, plain=True)
    y = function(*[entries[name] for entries, name in places], x)
    near = bool((y - expected).norm() <= _NEAR * expected.norm())
    return (function, places) if near and y.shape == expected.shape else None


class _Facts:
    """What the code of a module depends on beside tensors, as it was.

    Args:
        module: its own Python runs.
    """

    __slots__ = ("hooks", "known")

    def __init__(self, module: nn.Module) -> None:
        self.known: list[tuple[Callable[[Any], Any], Any, Any]] = []
        """What reads entries of a dictionary, the dictionary, and what it gave: children, their
        code and their graphs, dictionaries of hooks, and numbers."""
        self.hooks: list[dict[Any, Any]] = [
            everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks,
            everywhere._global_backward_hooks, everywhere._global_backward_pre_hooks,
        ]  # fmt: skip
        for each in module.modules():
            self._note(each._modules, list(each._modules))
            self.known.append((len, vars(each), len(vars(each))))  # no attribute more, or less
            self.known.append((_FORWARD, type(each), _FORWARD(type(each))))
            hooks = _OWN_HOOKS if each is module else _HOOKS
            self._note(vars(each), ["forward", *hooks])
            self.hooks += [vars(each)[name] for name in hooks]
            if isinstance(each, StandIn):
                for graph in vars(each)["quantization"].graphs:
                    self._note(graph._modules, ["body"])
                    self._note(vars(graph), _HOOKS)
                    self.hooks += [vars(graph)[name] for name in _HOOKS]
            else:
                own = vars(each)
                plain = [n for n, x in list(own.items()) if type(x) in _PLAIN or callable(x)]
                self._note(own, [name for name in plain if name not in ("forward", _CALL)])

    def _note(self, entries: dict[str, Any], names: Sequence[str]) -> None:
        names = [name for name in names if name in entries]
        if names:
            get = operator.itemgetter(*names)
            self.known.append((get, entries, get(entries)))

    def hold(self) -> bool:
        """Whether all is as it was, and no hook wants to see a call inside."""
        if any(self.hooks):
            return False
        try:
            for get, entries, value in self.known:
                if get(entries) != value:
                    return False
        except KeyError:
            return False
        return True


def _kind(x: Any) -> Any:
    """Sizes and type of a tensor, None of what is none."""
    return (x.shape, x.dtype) if isinstance(x, Tensor) else None


def _traced() -> bool:
    return torch._C._get_tracing_state() is not None
