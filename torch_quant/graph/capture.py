"""A model as captured regions: the whole of it if it exports, else each largest part that does.

Capture is driven by real calls. A region that does not export becomes glue: its forward runs in
Python, on a shadow whose children are regions again.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import nn

from torch_quant.errors import CaptureFailed
from torch_quant.graph.calls import Call, bind, flatten_call
from torch_quant.graph.export import CapturedGraph, ModelRefuses, export_graph, no_fastpath
from torch_quant.graph.shadow import shadow

__all__ = ["Executor", "Region", "Runner"]

logger = logging.getLogger("torch_quant")


class Region:
    """One module of a model and the graphs captured of it.

    Args:
        module: the module's shadow, in eval mode.
        path: its path in the whole model, empty for the model itself.
    """

    def __init__(self, module: nn.Module, path: str = "") -> None:
        self.module = module
        self.path = path
        self.signature = inspect.signature(module.forward)
        self.graphs: list[tuple[Any, CapturedGraph]] = []
        self.children: dict[str, Region] = {}
        self.failure = ""
        self.borrowed: set[str] = set()
        self.called = False

    def find(self, call: Call) -> CapturedGraph | None:
        """The graph that serves ``call``, if one was captured."""
        signature = call.signature
        for known, graph in self.graphs:
            if known == signature and graph.contract.mismatch(call) is None:
                return graph
        return None

    def resolve(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Call, CapturedGraph] | None:
        """The call and the graph for it, captured now if need be; None if it must run as glue.

        Raises:
            CaptureFailed: the inputs do not fit the module, or the float module fails on them.
        """
        args, kwargs = bind(self.signature, args, kwargs)
        self.called = True
        if self.failure and not self.graphs:
            return None
        try:
            call = flatten_call(args, kwargs)
            graph = self.find(call)
            if graph is None and not self.failure:
                graph = export_graph(self.module, call)
                self.graphs.append((call.signature, graph))
                logger.info("captured %s as one graph", self.path or "the model")
            return None if graph is None else (call, graph)
        except ModelRefuses:
            raise
        except CaptureFailed as error:
            self._split(str(error))
            return None

    def _split(self, reason: str) -> None:
        self.failure = reason
        self.children = {
            f"{self.path}.{name}".strip("."): Region(child, f"{self.path}.{name}".strip("."))
            for name, child in _callable_children(self.module)
        }
        logger.info("%s is captured in pieces: %s", self.path or "the model", reason)

    def walk(self) -> Iterator[Region]:
        """This region and all below it."""
        yield self
        for child in self.children.values():
            yield from child.walk()


def _callable_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Direct children, through containers that are never called themselves."""
    seen: set[int] = set()
    for name, child in module.named_children():
        if type(child).forward is nn.Module.forward:
            inner = [(f"{name}.{below}", m) for below, m in _callable_children(child)]
        else:
            inner = [(name, child)]
        for path, found in inner:
            if id(found) not in seen:
                seen.add(id(found))
                yield path, found


class Runner(Protocol):
    """Runs a captured graph in some transformed way."""

    def __call__(self, region: Region, graph: CapturedGraph, call: Call) -> Any: ...


class Executor(nn.Module):
    """A region that can be called like its module; captures as calls come in.

    Args:
        region: what to run.
        run: how to run its graphs.
    """

    def __init__(self, region: Region, run: Runner) -> None:
        super().__init__()
        self.__dict__["region"] = region  # no submodule: its parameters are the user's
        self.run = run
        self._glue: nn.Module | None = None
        self.eval()

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._opened())

    def __getitem__(self, index: Any) -> Any:
        return self._opened()[index]

    def __len__(self) -> int:
        return len(self.region.module)

    def __bool__(self) -> bool:
        return not hasattr(self.region.module, "__len__") or len(self) > 0

    def _opened(self) -> Any:
        """Glue that calls the layers of a sequence one by one: each is a region then."""
        if not self.region.failure:
            self.region._split("its layers are called one by one")
        self.region.called = True
        if self._glue is None:
            self._glue = glue(self.region, lambda child: Executor(child, self.run))
        return self._glue

    def __getattr__(self, name: str) -> Any:
        """Glue may reach into a child (``self.proj.weight``): the child's own attribute, noted."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            region: Region = self.__dict__["region"]
            value = getattr(region.module, name)
            region.borrowed.add(name)
            return value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        resolved = self.region.resolve(args, kwargs)
        if resolved is not None:
            call, graph = resolved
            return self.run(self.region, graph, call)
        if self._glue is None:
            self._glue = glue(self.region, lambda child: Executor(child, self.run))
        with no_fastpath():
            return self._glue(*args, **kwargs)


def glue(region: Region, make: Callable[[Region], nn.Module]) -> nn.Module:
    """The region's module with every child region replaced by what ``make`` gives for it."""
    return shadow(region.module, {child.module: make(child) for child in region.children.values()})
