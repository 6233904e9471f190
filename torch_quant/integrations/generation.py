"""transformers' ``generate`` with decode steps that PyTorch's compiler makes.

In decoding, a layer computes for some 50 microseconds, so what is around the layers counts. The
compiler makes one function of a step; the prompt runs as it is, since each has another length.
"""

from __future__ import annotations

import itertools
import logging
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.generation.configuration_utils import CompileConfig

from torch_quant.core.packages import missing_compiler
from torch_quant.errors import BackendUnavailable, InvalidConfig
from torch_quant.nn.described import Described
from torch_quant.proxies.base import Tied

__all__ = ["compiled_steps"]

logger = logging.getLogger("torch_quant")

_NUMBERS = itertools.count()
_COMPILED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Callable[..., Any]]]
_COMPILED = weakref.WeakKeyDictionary()
"""Model -> what it was made of, and its compiled call. It is no attribute of the model, which is
copied and saved."""


def compiled_steps(model: nn.Module) -> dict[str, Any]:
    """Options with which ``model.generate`` runs compiled decode steps on a CPU.

    The first steps are compiled, which takes up to two minutes, and again at the first other
    size; from then on every size is served. Without the options the model runs as before.

    A compiled step doesn't look at the settings of the model's modules again: change them before.
    Where modules, hooks, or shapes of weights are others in a later call of ``generate``, it is
    compiled again. Values of weights may change.

    Args:
        model: a quantized model, or a float one, of a class that generates.

    Returns:
        what to give to ``generate``.

    Raises:
        BackendUnavailable: there is no C++ compiler, or this is torch 2.8, whose compiler fails on
            configurations of transformers 5.
        InvalidConfig: the model's class has no ``generate``, this is a proxy, or its code reads
            weights that are integers now, as T5's does.

    Example::

        steps = compiled_steps(quant_model)
        quant_model.generate(**inputs, max_new_tokens=100, **steps)
    """
    if torch.__version__.startswith("2.8."):
        raise BackendUnavailable(
            f"decode steps can't be compiled: the compiler of torch {torch.__version__} fails on "
            "configurations of transformers 5; it works with torch 2.13 (pip install -U torch)"
        )
    if missing := missing_compiler():
        raise BackendUnavailable(f"decode steps can't be compiled: {missing}")
    if isinstance(model, Tied):
        raise InvalidConfig(
            f"compiled_steps({type(model).__name__}): a proxy records what its layers see, in code "
            "that can't be compiled; give what quantizer.quantize(model) returns"
        )
    if not callable(getattr(model, "get_compiled_call", None)):
        raise InvalidConfig(
            f"compiled_steps({type(model).__name__}): expected a language model of transformers, "
            "which has generate() and get_compiled_call()"
        )
    for path, module in model.named_modules():
        if any(isinstance(each, Described) for each in vars(module).values()):
            raise InvalidConfig(
                f"compiled_steps({type(model).__name__}): the model's code asks for the weight of "
                f"{path}, to see its dtype, which the compiler can't follow for integers; generate "
                f"without, or leave the layer in float: overrides={{{path!r}: None}}"
            )
    vars(model)["get_compiled_call"] = types.MethodType(get_compiled_call, model)
    config = CompileConfig()
    config._compile_all_devices = True  # type: ignore[assignment]
    return {"cache_implementation": "static", "compile_config": config}


def get_compiled_call(model: nn.Module, config: CompileConfig | None = None) -> Callable[..., Any]:
    """The model's call, compiled once; a method of the model that transformers calls for it."""
    made_of = list(_made_of(model))
    known = _COMPILED.get(model)
    if known is None or known[0] != made_of:
        logger.info("the first decode step is compiled, which takes up to two minutes")
        whole = bool(getattr(model, "_can_compile_fullgraph", False))
        step = _own_code(weakref.ref(model))
        known = made_of, torch.compile(step, fullgraph=whole, options=_options())
        _COMPILED[model] = known
    return known[1]


get_compiled_call.made_anew = True  # type: ignore[attr-defined]


def _made_of(model: nn.Module) -> Iterator[Any]:
    """What a compiled step takes for granted."""
    for module in model.modules():
        own = vars(module)
        hooks = len(own["_forward_hooks"]), len(own["_forward_pre_hooks"])
        tensors = [*own["_parameters"].values(), *own["_buffers"].values()]
        yield id(module), module.training, hooks, [x is not None and x.shape for x in tensors]


def _own_code(model: weakref.ref[nn.Module]) -> Callable[..., Any]:
    """A function whose code no other has: what is compiled is kept by code.

    Two models of one class would else take each other's, as their modules aren't compared.
    """

    def step(*args: Any, **kwargs: Any) -> Any:
        return model()(*args, **kwargs)  # type: ignore[misc]

    code = step.__code__.replace(co_name=f"step_{next(_NUMBERS)}")
    return types.FunctionType(code, step.__globals__, None, None, step.__closure__)


def _options() -> dict[str, Any] | None:
    """To look at a model's thousand modules before each step takes a quarter of its time."""
    skip = getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None)
    return None if skip is None else {"guard_filter_fn": skip}
