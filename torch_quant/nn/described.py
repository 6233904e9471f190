"""A tensor that has dtype, device and sizes, and no values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_quant.errors import QuantError

__all__ = ["Described"]


class Described(Tensor):
    """Stands for a float weight of which a quantized model has integers alone.

    Code asks such a weight for its dtype, to cast what it gives to the layer. To compute with it is
    an error.

    Args:
        shape: its sizes.
        dtype: its type.
        device: where its integers are.
        path: its path in the model.
        trains: what it says of ``requires_grad``; nothing is differentiated by it.

    >>> weight = Described((4, 2), torch.float32, torch.device("cpu"), "wo.weight")
    >>> weight.dtype, weight.shape[0], weight.is_floating_point()
    (torch.float32, 4, True)
    """

    weight_path: str
    _trains: bool

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        path: str,
        trains: bool = False,
    ) -> Described:
        """Makes one without memory."""
        new: Described = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        new.weight_path, new._trains = path, trains
        new._is_param = True  # which isinstance(x, nn.Parameter) asks
        return new

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Raise :class:`QuantError`, unless the operator asks for no values either."""
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            return func.decompose(*args, **(kwargs or {}))
        found = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Described)]
        where = found[0].weight_path if found else "a weight"
        raise QuantError(
            f"the model's own code computes {func} with {where}, of which the quantized model has "
            "integers alone: in the first call that was recorded, the code asked for its dtype, "
            "device or sizes and no more. Leave the layer in float: "
            f"Quantizer(overrides={{{where.rpartition('.')[0]!r}: None}})"
        )

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """As the float weight says."""
        return self._trains

    @property
    def _facts(self) -> tuple[Any, ...]:
        return tuple(self.shape), self.dtype, self.device, self.weight_path, self._trains

    def __deepcopy__(self, memo: Any) -> Described:
        return Described(*self._facts)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Described, self._facts

    def __repr__(  # type: ignore[override]
        self, *, tensor_contents: Any = None
    ) -> str:
        return f"Described({self.weight_path}: {tuple(self.shape)}, {self.dtype}, {self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [], self._facts

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> Described:
        return Described(*context)
