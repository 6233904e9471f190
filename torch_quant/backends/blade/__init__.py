"""torch_blade, the compiler of BladeDISC: TorchScript with fake-quantizers around linear layers."""

from torch_quant.backends.blade.backend import DiscBackend

__all__ = ["DiscBackend"]
