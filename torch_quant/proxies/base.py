"""What every proxy shares: it follows the float model, and its parameters are not its own."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant.errors import InvalidConfig, QuantError
from torch_quant.graph.calls import Call
from torch_quant.graph.capture import Executor, Region
from torch_quant.graph.export import CapturedGraph
from torch_quant.model import CapturedModel
from torch_quant.nn.forward import SignedForward
from torch_quant.session import Session

__all__ = ["Proxy", "Tied"]


class Tied:
    """Base of what is tied to the model objects it has captured: not to be pickled or copied."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InvalidConfig(
            f"a {type(self).__name__} is tied to the float model it was given and cannot be copied "
            "or pickled: keep the float model and quantizer.state_dict(), and give that to "
            "load_state_dict of a new Quantizer with the same settings"
        )


class Proxy(Tied, nn.Module):
    """Runs the captured model in some instrumented form.

    Args:
        session: the quantizer and the model.
    """

    _executor: Executor

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self._reset()
        # Whoever passes only what a model takes asks for its signature.
        self.forward = SignedForward(self.forward, self.captured.region.signature)
        self.eval()

    def _reset(self) -> None:
        """Forget the instrumented graphs: the model's tensors are other ones now."""
        self._version = self.captured.version
        # No submodule: what is done to the proxy (double(), train()) must not reach the parameters.
        self.__dict__["_executor"] = Executor(self.captured.region, self._run)

    def __getattr__(self, name: str) -> Any:
        """In pieces: what the model's own code has (a method, the state it keeps)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            executor = self.__dict__.get("_executor")
            if executor is None or name.startswith("_") or not executor.region.opened:
                raise
            return getattr(executor.glue(), name)

    @property
    def captured(self) -> CapturedModel:
        """What it runs."""
        return self.session.captured

    @property
    def model(self) -> nn.Module:
        """The float model; raises :class:`InvalidConfig` if it no longer exists."""
        return self.session.model

    def _follow(self) -> None:
        """Notice that the float model's parameters were replaced."""
        self.session.refresh()
        if self._version != self.captured.version:
            self._reset()

    def train(self, mode: bool = True) -> Proxy:
        """Stays in eval mode, as it was captured."""
        return super().train(False)

    @abstractmethod
    def _run(self, region: Region, graph: CapturedGraph, call: Call) -> Any:
        """Run one captured graph, instrumented; returns the region's output."""


def check_not_empty(inputs: Any, batch: int) -> None:
    """Raise :class:`QuantError` if a tensor among ``inputs`` holds no sample."""
    for x in pytree.tree_leaves(inputs):
        if isinstance(x, Tensor) and x.dim() and x.shape[0] == 0:
            raise QuantError(
                f"calibration batch {batch} is empty: an input has shape {tuple(x.shape)}; "
                "leave it out"
            )
