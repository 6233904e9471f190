"""A block of a model, as what rounds its weights with data sees it: one decoder layer, say.

The block stands in a twin of the model, so whatever is done to it is not done to the user's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_quant.core.functional import dequantize
from torch_quant.core.methods import Transform, WeightMethod
from torch_quant.core.qparams import QParams
from torch_quant.core.rounded import Scaling
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import QuantError
from torch_quant.graph.sites import Site
from torch_quant.statistics import Statistic

__all__ = ["Block", "Layer", "Part", "Reading", "Sample"]


@dataclass(frozen=True)
class Sample:
    """One call of a block.

    Args:
        args: its positional arguments.
        kwargs: its keyword arguments.
        place: where the tensor stands that the block before makes: a number or a keyword.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: int | str

    @property
    def hidden(self) -> Tensor:
        """The tensor that the block before makes."""
        found = self.args[self.place] if isinstance(self.place, int) else self.kwargs[self.place]
        assert isinstance(found, Tensor)
        return found

    def with_hidden(self, x: Tensor) -> Sample:
        """The same call with another such tensor."""
        if isinstance(self.place, int):
            args = (*self.args[: self.place], x, *self.args[self.place + 1 :])
            return Sample(args, self.kwargs, self.place)
        return Sample(self.args, {**self.kwargs, self.place: x}, self.place)


@dataclass(frozen=True)
class Part:
    """One call of a block that stands for some of its samples.

    Args:
        sample: the call.
        target: what the float block gives.
        importance: what an error counts, in the shape of the target; None for 1.
        numbers: of the samples.
    """

    sample: Sample
    target: Tensor
    importance: Tensor | None
    numbers: tuple[int, ...]

    def error(self, result: Tensor) -> Tensor:
        """The mean squared error of a result, weighted by what errors count.

        >>> target = torch.zeros(2)
        >>> part = Part(Sample((target,), {}, 0), target, torch.tensor([3.0, 1.0]), (0,))
        >>> part.error(torch.tensor([2.0, 0.0]))
        tensor(6.)
        """
        squares = (result - self.target).float().square()
        return (squares if self.importance is None else squares * self.importance).mean()


@dataclass(eq=False)
class Layer:
    """One layer of a block, whose weight is to be rounded: linear, or of a graph a convolution too.

    Args:
        site: its name in the plan.
        path: inside of the block, ``"self_attn.q_proj"``.
        module: holds ``weight`` and perhaps ``bias``.
        spec: the format, its granularity bound to the axis of the output channels.
        method: what rounds it.
        transforms: what scales it before.
        described: the site itself, whose keys statistics are asked for by.
        transposed: whether the module holds the weight as ``[in, out]``.
    """

    site: str
    path: str
    module: nn.Module
    spec: QuantSpec
    method: WeightMethod
    transforms: tuple[Transform, ...]
    described: Site
    transposed: bool = False
    rounded: tuple[Tensor, QParams] | None = None
    """Codes and what they stand for, once :meth:`round_to` was called."""
    exact: Tensor | None = None
    """The weight before that, ``[out, in]``."""

    @property
    def weight(self) -> Tensor:
        """The weight as it is now, ``[out, in]``: scaled, or rounded."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight.detach().T if self.transposed else weight.detach()

    def set_weight(self, weight: Tensor) -> None:
        """Have the twin compute with another weight, ``[out, in]``; the model keeps its own."""
        value = weight.T if self.transposed else weight
        self.module._parameters["weight"] = nn.Parameter(value, requires_grad=False)

    def round_to(self, codes: Tensor, qparams: QParams) -> None:
        """The result of a method: the twin computes with what the codes stand for from now on."""
        self.exact = self.weight if self.exact is None else self.exact
        self.rounded = codes, qparams
        self.set_weight(dequantize(codes, qparams))


@dataclass(eq=False)
class Reading:
    """Layers that read one tensor: query, key and value.

    Args:
        layers: they.
        producer: the module that makes the tensor, where its output channels can be scaled without
            changing anything else; a norm, or a linear layer. None where there is none.
        producer_path: its path inside of the block.
        once: whether each of them runs once in every sample.
    """

    layers: tuple[Layer, ...]
    producer: nn.Module | None = None
    producer_path: str = ""
    once: bool = True


_Key = tuple[int, int, int]
"""Number of a sample, and identity and version of a tensor that it has a layer read."""


@dataclass(frozen=True)
class _Group:
    """Layers that read the same tensors, and whether each runs once in every sample."""

    layers: tuple[Layer, ...]
    once: bool


@dataclass(eq=False)
class Block:
    """One block of a model.

    Args:
        path: in the model, ``"model.layers.3"``; empty for the model itself.
        module: its twin, in eval mode.
        layers: those to round, in the order in which they run.
        samples: the calls of it, as the rounded blocks before make them.
        targets: for each, what the float block gives for what float blocks before make, where a
            method ``wants_targets``. Other inputs, the result of an encoder say, are those of the
            rounded model.
        floats: for each, the call with what float blocks before make; where there are targets.
        importance: for each, what the error of each element of the result counts, in the shape of
            the target; None for 1.
        producers: path of a layer -> path of the module that may be scaled before it.
        caller: what calls the module with the arguments of a sample, where they are others.
    """

    path: str
    module: nn.Module
    layers: tuple[Layer, ...]
    samples: list[Sample]
    targets: list[Tensor] | None = None
    floats: list[Sample] | None = None
    importance: list[Tensor] | None = None
    producers: Mapping[str, str] = field(default_factory=dict)
    caller: Callable[..., Any] | None = None
    scaled: dict[str, Scaling] = field(default_factory=dict)
    """Name of a parameter inside of the block -> what it was multiplied by."""
    _known: list[_Group] | None = field(default=None, repr=False)

    def run(self, sample: Sample) -> Tensor:
        """The block's first result for one call, with the weights as they are now."""
        return first_float(self.call(sample))

    def call(self, sample: Sample) -> Any:
        """All that the block gives for one call; what it writes to is a copy."""
        args, kwargs = fresh((sample.args, dict(sample.kwargs)))
        return (self.caller or self.module)(*args, **kwargs)

    def gathered(self, chosen: Iterable[int]) -> Iterator[Part]:
        """Some samples as calls of the block, each with what its result should be.

        Args:
            chosen: numbers of samples.
        """
        assert self.targets is not None
        for i in chosen:
            importance = None if self.importance is None else self.importance[i]
            yield Part(self.samples[i], self.targets[i], importance, (i,))

    def outputs(self) -> Iterator[Tensor]:
        """Its result for each sample."""
        with torch.no_grad():
            for sample in self.samples:
                yield self.run(sample)

    def reading(self, layers: Iterable[Layer] | None = None) -> list[Reading]:
        """The layers by the tensors that they read, in the order in which they run.

        Of one reading are layers that read the same tensors in every sample. A producer is named
        where each of them runs once in every sample. Layers that no sample reaches are in none.
        """
        chosen = set(self.layers if layers is None else layers)
        modules = dict(self.module.named_modules())
        found = []
        for group in self._groups():
            mine = tuple(layer for layer in group.layers if layer in chosen)
            paths = {self.producers.get(layer.path, "") for layer in mine}
            path = paths.pop() if len(paths) == 1 and group.once else ""
            if mine:
                found.append(Reading(mine, modules.get(path) if path else None, path, group.once))
        return found

    def _groups(self) -> list[_Group]:
        """The groups of all layers, found by one run of every sample."""
        if self._known is None:
            self._run(lambda layer, x, key: None)
        assert self._known is not None
        return self._known

    def _run(self, note: Callable[[Layer, Tensor, _Key], None]) -> None:
        """Call every sample, note what each layer reads, and learn which read the same."""
        read: dict[Layer, list[_Key]] = {}
        for number, sample in enumerate(self.samples):
            held: list[Tensor] = []  # so that no id is given twice

            def keep(layer: Layer, x: Tensor, number: int = number, held: Any = held) -> None:
                held.append(x)
                version = -1 if x.is_inference() else x._version  # it may change in place
                read.setdefault(layer, []).append((number, id(x), version))
                note(layer, x, read[layer][-1])

            with torch.no_grad(), self.watched(keep):
                self.call(sample)
        groups: dict[tuple[_Key, ...], list[Layer]] = {}
        for layer, keys in read.items():
            groups.setdefault(tuple(keys), []).append(layer)
        every = list(range(len(self.samples)))
        self._known = [
            _Group(tuple(same), [number for number, *_ in keys] == every)
            for keys, same in groups.items()
        ]

    @contextmanager
    def watched(self, note: Callable[[Layer, Tensor], None]) -> Iterator[None]:
        """Have ``note`` told of what each layer reads."""
        with ExitStack() as stack:
            for layer in self.layers:

                def hook(_: nn.Module, args: tuple[Any, ...], layer: Layer = layer) -> None:
                    note(layer, args[0])

                handle = layer.module.register_forward_pre_hook(hook)
                stack.callback(handle.remove)
            yield

    def observe(
        self, layers: Sequence[Layer], method: WeightMethod
    ) -> dict[str, dict[str, Statistic]]:
        """What ``method`` wants to know of the inputs of ``layers``, over all samples.

        Layers that read the same tensors in every sample share statistics of them.

        Returns:
            Site -> what for -> statistic, as :meth:`WeightMethod.quantize` takes it.
        """
        if not any(wanted_of(method, layer) for layer in layers):
            return {layer.site: {} for layer in layers}
        leads = {} if self._known is None else self._leads(layers, method)
        found = self._observed(layers, method, leads)
        if leads != (right := self._leads(layers, method)):  # only some samples share a tensor
            found = self._observed(layers, method, leads := right)
        return {layer.site: found[leads[layer]] for layer in layers}

    def _leads(self, layers: Sequence[Layer], method: WeightMethod) -> dict[Layer, Layer]:
        """Layer -> the first that reads what it reads, and asks for the same."""
        leads = {layer: layer for layer in layers}
        for group in (reading.layers for reading in self.reading(layers)):
            for layer in group:
                same = wanted_of(method, layer).keys() == wanted_of(method, group[0]).keys()
                leads[layer] = group[0] if same else layer
        return leads

    def _observed(
        self, layers: Sequence[Layer], method: WeightMethod, leads: dict[Layer, Layer]
    ) -> dict[Layer, dict[str, Statistic]]:
        """Statistics of what leads read, by one run of every sample.

        Args:
            layers: they.
            method: says what is observed.
            leads: if empty, filled by the first sample.
        """
        wanted = {layer: wanted_of(method, layer) for layer in layers}
        found = {layer: {what: make() for what, make in wanted[layer].items()} for layer in layers}
        readers: dict[_Key, Layer] = {}
        known = bool(leads)

        def note(layer: Layer, x: Tensor, key: _Key) -> None:
            if layer not in wanted:
                return
            if not known and layer not in leads:
                lead = readers.setdefault(key, layer)
                leads[layer] = lead if wanted[lead].keys() == wanted[layer].keys() else layer
            if leads[layer] is layer and x.numel():
                for each in found[layer].values():
                    each.observe(x.detach())

        self._run(note)
        for layer in layers:
            leads.setdefault(layer, layer)
        return found

    def scale(self, reading: Reading, factor: Tensor) -> None:
        """Divide a tensor's channels by ``factor`` where it is made; multiply where it is read.

        Args:
            reading: has a ``producer``.
            factor: positive, ``[channels]``.
        """
        if reading.producer is None:
            raise QuantError(f"{self.path}: nothing can be scaled before {reading.layers[0].path}")
        inverse = 1 / factor
        made_by = [layer for layer in self.layers if layer.module is reading.producer]
        turned = bool(made_by) and made_by[0].transposed
        for name, value in list(reading.producer._parameters.items()):
            if value is not None:
                matrix = turned and name == "weight"
                how = Scaling(columns=inverse) if matrix else Scaling(rows=inverse)
                self.rescale(f"{reading.producer_path}.{name}", how)
        for layer in reading.layers:
            how = Scaling(rows=factor) if layer.transposed else Scaling(columns=factor)
            self.rescale(f"{layer.path}.weight", how)

    def rescale(self, path: str, how: Scaling) -> None:
        """Scale one parameter, by its name inside of the block, and note it."""
        set_scaled(self.module, path, how)
        self.scaled[path] = self.scaled.get(path, Scaling()).then(how.rows, how.columns)


def set_scaled(root: nn.Module, path: str, how: Scaling) -> None:
    """Put a scaled copy in the place of a parameter of a twin."""
    owner, _, name = path.rpartition(".")
    module = root.get_submodule(owner)
    value = module._parameters[name]
    assert value is not None
    module._parameters[name] = nn.Parameter(how.apply(value.detach()), requires_grad=False)


def wanted_of(method: WeightMethod, layer: Layer) -> Mapping[str, Callable[[], Statistic]]:
    """What a method wants to know of the input of one layer."""
    site = layer.described
    return method.statistics(site).get(site.inputs[0], {})


def first_float(value: Any) -> Tensor:
    """The tensor that a block hands on: its result, or the first float tensor in it."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise QuantError(f"it gives a {type(value).__name__} without a float tensor")


_AS_IT_IS = (Tensor, int, float, str, bool, type(None), torch.dtype, torch.device)


def fresh(value: Any) -> Any:
    """``value`` with copies of the objects in it that a call may write to, a cache say."""
    if isinstance(value, _AS_IT_IS):
        return value
    if type(value) in (tuple, list):
        return type(value)(fresh(each) for each in value)
    if type(value) is dict:
        return {key: fresh(each) for key, each in value.items()}
    return copy.deepcopy(value)
