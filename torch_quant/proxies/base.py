"""What every proxy shares: it follows the float model, and its parameters are not its own."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant.errors import InvalidConfig, QuantError
from torch_quant.graph.calls import Call
from torch_quant.graph.capture import CapturedModule
from torch_quant.graph.executor import Executor
from torch_quant.graph.export import CapturedGraph
from torch_quant.model import CapturedModel
from torch_quant.nn.forward import SignedForward
from torch_quant.nn.stand_in import StandIn, class_of, made
from torch_quant.session import Session

__all__ = ["Proxy", "Tied"]


class Tied:
    """Base of what is tied to the model objects it has captured: not to be pickled or copied."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InvalidConfig(
            f"a {type(self).__name__} is tied to the float model it was given and cannot be copied "
            "or pickled: keep the float model and quantizer.save(folder); "
            "Quantizer.load(folder) gives it back"
        )


class _Front(StandIn):
    """Runs the methods of the model: where they call it, the proxy is called."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if isinstance(value, Tensor):  # a quantized model needs it, too
            self.__dict__["submodule"].borrowed.add(name)
        return value

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Those of the float model."""
        module: nn.Module = self.__dict__["submodule"].module
        yield from module.named_modules(memo, prefix, remove_duplicate)


class Proxy(Tied, nn.Module):
    """Runs the captured model in some instrumented form.

    It has the model's attributes and methods, which run with the proxy as ``self``: so
    ``generate()`` of a language model goes through the proxy.

    Args:
        session: the quantizer and the model.
    """

    def __init__(self, session: Session) -> None:
        nn.Module.__init__(self)
        self.session = session
        self._reset()
        # Whoever passes only what a model takes asks for its signature.
        self.forward = SignedForward(self.forward, self.captured.root.signature)
        self.__dict__.update({"training": False, "_inside": threading.local()})

    def _reset(self) -> None:
        """Forget the instrumented graphs: the model's tensors are other ones now."""
        self._version = self.captured.version
        # No submodule: what is done to the proxy (double(), train()) must not reach the parameters.
        self.__dict__["_executor"] = self._executor_of(self.captured.root)

    def _executor_of(self, submodule: CapturedModule) -> Executor:
        return Executor(submodule, self._run, self._called)

    def _called(self, executor: Executor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the model or of a part of it, by the proxy or by the user."""
        if getattr(self._inside, "now", False):
            return executor.execute(*args, **kwargs)
        return self._part(executor, args, kwargs)

    def _execute(
        self, executor: Executor, args: tuple[Any, ...], kwargs: dict[str, Any], new: bool = False
    ) -> Any:
        """Call the model or a part of it; what is called inside belongs to that call.

        Args:
            executor: runs it.
            args: positional inputs.
            kwargs: the others.
            new: whether no call of this kind was seen before.
        """
        before, self._inside.now = getattr(self._inside, "now", False), True
        try:
            return (executor.watched if new else executor)(*args, **kwargs)
        finally:
            self._inside.now = before

    def _part(self, executor: Executor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The user calls a part of the model by itself."""
        return self._execute(executor, args, kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> type[nn.Module]:  # type: ignore[override]
        """That of the model, for code that asks ``isinstance``."""
        session: Session | None = self.__dict__.get("session")
        return type(self) if session is None else class_of(session.captured.root.module)

    def __getattr__(self, name: str) -> Any:
        """What the model has; its methods call the proxy."""
        try:
            return nn.Module.__getattr__(self, name)  # no super(), for the sake of `__class__`
        except AttributeError:
            if "_executor" not in self.__dict__ or name[:2] == "__" == name[-2:]:
                raise
        return getattr(self._front(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = self.__dict__
        if "_inside" in own and name not in own and self._is_the_models(name):
            setattr(self._front(), name, value)
        else:  # not later than in its own constructor
            nn.Module.__setattr__(self, name, value)

    def _is_the_models(self, name: str) -> bool:
        module = self.captured.root.module
        of_class = hasattr(type(module), name) and not hasattr(nn.Module, name)
        return of_class or name in vars(module)

    def _front(self) -> _Front:
        executor = self._executor
        if "_front" not in executor.__dict__:
            front = made(_Front, executor.twin(), runs=True)
            front.__dict__.update({"submodule": executor.submodule, "forward": self.forward})
            executor.__dict__["_front"] = front
        found: _Front = executor.__dict__["_front"]
        return found

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Those of the float model, for who asks for its device or dtype."""
        yield from self.captured.root.module.named_modules(memo, prefix, remove_duplicate)

    def requires_grad_(self, requires_grad: bool = True) -> Proxy:
        """Nothing: the parameters are the float model's."""
        return self

    @property
    def captured(self) -> CapturedModel:
        """What it runs."""
        return self.session.captured

    def _follow(self) -> None:
        """Notice that the float model's parameters were replaced."""
        self.session.refresh()
        if self._version != self.captured.version:
            self._reset()

    def train(self, mode: bool = True) -> Proxy:
        """Stays in eval mode, as it was captured."""
        return self

    @abstractmethod
    def _run(self, submodule: CapturedModule, graph: CapturedGraph, call: Call) -> Any:
        """Run one captured graph, instrumented; returns the module's output."""


def check_differentiable(module: nn.Module, what: str) -> None:
    """Raise :class:`InvalidConfig` if autograd takes a parameter for a constant for good."""
    for name, x in module.named_parameters():
        if x.is_inference():
            raise InvalidConfig(
                f"{what} needs gradients, but {name!r} was made under torch.inference_mode(), "
                "which rules them out: build or load the model outside of it, or take "
                "copy.deepcopy(model), made outside of it"
            )


def check_not_empty(inputs: Any, batch: int) -> None:
    """Raise :class:`QuantError` if a tensor among ``inputs`` holds no sample."""
    for x in pytree.tree_leaves(inputs):
        if isinstance(x, Tensor) and x.dim() and x.shape[0] == 0:
            raise QuantError(
                f"calibration batch {batch} is empty: an input has shape {tuple(x.shape)}; "
                "leave it out"
            )
