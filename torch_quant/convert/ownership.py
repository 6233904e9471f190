"""A quantized model is a snapshot: tensors of the float model that it computes with become its own.

Large float weights may stay shared, on request. Then a change of them is noticed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_quant.convert.mounting import place_in_memory
from torch_quant.convert.nested import Replaced, tensors_in
from torch_quant.core.lending import Lender, content
from torch_quant.errors import QuantError
from torch_quant.nn.described import Described

__all__ = ["Owner", "SharedWeights"]

_LARGE = 2**16
"""Bytes from which on a float tensor is worth sharing."""


class SharedWeights:
    """Tensors that a quantized model shares with the float model, as they were when it was made.

    Copies and pickles of the quantized model have tensors of their own, so theirs is empty.
    """

    def __init__(self) -> None:
        self._known: list[tuple[str, Tensor, int]] = []

    def __reduce__(self) -> Any:
        return SharedWeights, ()

    def __len__(self) -> int:
        return len(self._known)

    def add(self, name: str, tensor: Tensor) -> None:
        self._known.append((name, tensor, tensor._version))

    def check(self) -> None:
        """Raise :class:`QuantError` if one of them was changed since."""
        for name, tensor, version in self._known:
            if tensor._version != version:
                raise QuantError(
                    f"{name} of the float model was changed, and the quantized model shares it: "
                    "quantize again, or with share_float_weights=False to be independent of it"
                )


def _copied(x: Tensor) -> Tensor:
    """A copy that lies in memory as ``x`` does; what is repeated by expansion is kept once."""
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if stride == 0 and size > 1:
            return _copied(x.narrow(dim, 0, 1)).expand(x.shape)
    return x.clone()


class Owner:
    """Makes the tensors of the float model a quantized model's own; tied ones stay tied.

    Args:
        theirs: name -> tensor of the float model.
        shared: notes the large float tensors, which are then not copied.
        held: the quantizer's own tensors. Large ones are lent, as long as no other model has them.
    """

    def __init__(
        self,
        theirs: Mapping[str, Tensor],
        shared: SharedWeights | None,
        held: Iterable[Tensor] = (),
    ) -> None:
        self.names = {
            x.untyped_storage()._cdata: name
            for name, x in reversed(list(theirs.items()))
            if x.layout == torch.strided
        }
        self.shared = shared
        self.lender = Lender(held)
        self.made: dict[tuple[Any, ...], Tensor] = {}
        self.constants: dict[tuple[Any, ...], Tensor] = {}
        self.held = Replaced()

    def put(self, x: Tensor, new: Tensor) -> None:
        """Have ``new`` in the place of a tensor of the float model."""
        self.made[place_in_memory(x)] = new

    def tensor(self, x: Tensor) -> Tensor:
        """``x``, or what the quantized model has in its place; tied tensors stay tied."""
        if x.layout != torch.strided or isinstance(x, Described):
            return x
        name = self.names.get(x.untyped_storage()._cdata)
        if name is None and not isinstance(x, nn.Parameter):
            return self._once(x)
        place = place_in_memory(x)
        if place not in self.made:
            self.made[place] = self._new(name, x.detach())
        new = self.made[place]
        if not isinstance(x, nn.Parameter):
            return new
        key = (*place, "parameter")
        return self.made.setdefault(key, nn.Parameter(new, requires_grad=False))

    def _once(self, x: Tensor) -> Tensor:
        """``x``, or an equal constant: integers of tied weights are tied."""
        if x.nbytes < _LARGE or x.device.type != "cpu":
            return self.lender.own(x)
        key = (content(x), x.shape, x.stride())
        if key not in self.constants:
            self.constants[key] = self.lender.lent(x, key[0])
        found = self.constants[key]
        return found if torch.equal(found, x) else self.lender.own(x)

    def _new(self, name: str | None, x: Tensor) -> Tensor:
        if name is None:
            return x
        large = x.is_floating_point() and x.nbytes >= _LARGE
        if self.shared is None or not large or x.is_inference():
            return _copied(x)
        self.shared.add(name, x)
        return x

    @torch.no_grad()
    def take(self, modules: Iterable[nn.Module]) -> None:
        """Replace every tensor of the float model in ``modules`` by a copy.

        Parameters become parameters that take no gradient.

        Args:
            modules: the quantized model's own already; their tensors may be the float model's.
        """
        scripted: dict[int, nn.Module] = {}
        for module in list(modules):
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for name, child in module._modules.items():
                if isinstance(child, torch.jit.ScriptModule):
                    module._modules[name] = scripted.setdefault(id(child), copy.deepcopy(child))
            for tensors in (module._parameters, module._buffers):
                for name, value in tensors.items():
                    if value is not None:
                        tensors[name] = self.tensor(value)  # type: ignore[assignment]
            self.attributes(module.__dict__)

    def attributes(self, values: dict[str, Any]) -> None:
        """The same for what the attributes of one module lead to; see :class:`Replaced`."""
        for name, value in list(values.items()):
            if _is_of_interest(name):
                values[name] = self.held(value, self.tensor)


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that attributes of modules lead to, through containers and objects, by name."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, value in vars(module).items():
            if _is_of_interest(name):
                where = f"{path}.{name}".strip(".")
                for number, x in enumerate(tensors_in(value, seen)):
                    yield f"{where} ({number})" if number else where, x


def _is_of_interest(name: str) -> bool:
    """Whether an attribute is the user's own; hooks belong to whoever has registered them."""
    return name not in ("_parameters", "_buffers", "_modules") and "_hooks" not in name
