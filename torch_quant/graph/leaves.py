"""Graphs of plain layers, written down at once: exporting one takes twenty times as long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.graph.calls import Call, identifiers
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.forgetting import forgotten
from torch_quant.graph.outputs import flatten_output
from torch_quant.graph.running import copied, frozen
from torch_quant.graph.shapes import ShapeContract

__all__ = ["LEAVES", "layer_graph"]

aten = torch.ops.aten

_Operands = tuple[list[str], Callable[..., tuple[Any, ...]]]
"""Names of the parameters, and the operator's arguments from input and parameters."""


def layer_graph(module: nn.Module, call: Call) -> CapturedGraph | None:
    """The graph of a linear layer or an embedding for any sizes; None for every other module.

    It is what exporting the module gives, and is compared with the module on ``call``.
    """
    found = _operands(module)
    if found is None or len(call.positions) != 1 or len(call.leaves) != 1 or call.numbers:
        return None
    names, arguments = found
    target = _TARGETS[type(module)]
    (x,) = call.tensors
    if type(x) is not Tensor or x.dim() == 0 or x.layout != torch.strided:
        return None
    parameters = [module._parameters[name] for name in names]
    fixed = {x.dim() - 1} if isinstance(module, nn.Linear) else set()
    graph = fx.Graph()
    nodes = [graph.get_attr(name) for name in names]
    input_name = identifiers(call.names(), set(names))[0]
    given = graph.placeholder(input_name)
    made = graph.call_function(target, arguments(given, *nodes))
    graph.output((made,))
    try:
        with forgotten():
            values, val = _fake(module, x, parameters, fixed)
    except Exception:  # it does not take this input; exporting tells why
        return None
    for node, value in zip((given, *nodes), values, strict=True):
        node.meta["val"] = value
    cls = type(module)
    made.meta["val"] = val
    made.meta["nn_module_stack"] = {"captured": ("", f"{cls.__module__}.{cls.__qualname__}")}
    gm = fx.GraphModule(dict(zip(names, parameters, strict=True)), graph)
    sizes = tuple(int(str(s)) if str(s).isdecimal() else str(s) for s in values[0].shape)
    with frozen(module):
        output = module(*copied(call).tensors)
        leaves, spec = flatten_output(output)
        if not torch.equal(gm(*copied(call).tensors)[0].nan_to_num(), leaves[0].nan_to_num()):
            return None
    return CapturedGraph(gm, ShapeContract(call.names(), [sizes]), spec)


_TARGETS: dict[type[nn.Module], Any] = {
    nn.Linear: aten.linear.default,
    nn.Embedding: aten.embedding.default,
}


LEAVES = frozenset(_TARGETS)
"""Classes of layers that compute each row of their input by itself, whatever its rank."""


def _operands(module: nn.Module) -> _Operands | None:
    """Of a module that is just what its class makes it, without hooks or another forward."""
    if type(module) not in _TARGETS or "forward" in vars(module):
        return None
    if any(value for name, value in vars(module).items() if "_hooks" in name):
        return None
    if module._modules or module._parameters.get("weight") is None:
        return None
    if isinstance(module, nn.Embedding):
        padding = () if module.padding_idx is None else (module.padding_idx,)
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            return None
        return ["weight"], lambda x, weight: (weight, x, *padding)
    if module._parameters.get("bias") is None:
        return ["weight"], lambda x, weight: (x, weight)
    return ["weight", "bias"], lambda x, weight, bias: (x, weight, bias)


def _fake(
    module: nn.Module, x: Tensor, parameters: list[Any], fixed: set[int]
) -> tuple[list[Any], Any]:
    """Input, parameters and result as tensors without values, free sizes as symbols."""
    # Imported here: sympy stands behind it.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    env = ShapeEnv(specialize_zero_one=False, duck_shape=False)
    mode = FakeTensorMode(shape_env=env)
    kinds = [DimDynamic.STATIC if i in fixed else DimDynamic.DYNAMIC for i in range(x.dim())]
    context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
    values = [mode.from_tensor(x.detach(), symbolic_context=context)]
    values += [mode.from_tensor(each, static_shapes=True) for each in parameters]
    linear = isinstance(module, nn.Linear)
    sizes = values[0].shape[:-1] if linear else values[0].shape
    width = parameters[0].shape[0 if linear else 1]
    with mode:
        return values, torch.empty((*sizes, width), dtype=parameters[0].dtype, device=x.device)
