"""Round the weights of a model a block at a time, each block on what the rounded ones before give.

What a method needs is recorded of one block, so memory beside the model is that of one block and of
the samples' tensors between two blocks.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_quant.algorithms import DEFAULT_METHOD
from torch_quant.algorithms.blocks import Block, Layer, Sample, first_float, set_scaled
from torch_quant.core.functional import dequantize
from torch_quant.core.memory import give_back
from torch_quant.core.metrics import sqnr
from torch_quant.core.plan import QuantPlan
from torch_quant.core.rounded import RoundedWeight, RoundedWeights, checksum
from torch_quant.errors import InvalidConfig, QuantError
from torch_quant.graph.progress import hidden
from torch_quant.graph.sites import Site
from torch_quant.graph.twin import twin_of
from torch_quant.rounding.chains import (
    Chain,
    Rounded,
    call,
    find_chains,
    recorded,
    replaced,
)
from torch_quant.rounding.exactness import as_it_was, check_scales, scale_exactly
from torch_quant.rounding.experts import Experts, find_experts, round_experts
from torch_quant.rounding.files import Folder
from torch_quant.rounding.modules import (
    RoundedTable,
    computes_linear,
    own_buffers,
    rounded_embeddings,
)
from torch_quant.rounding.producers import find_producers
from torch_quant.rounding.report import BlockError, Rounding
from torch_quant.rounding.weights import FloatWeights

__all__ = ["round_layers", "round_weights"]

logger = logging.getLogger("torch_quant")


def round_weights(
    model: nn.Module,
    sites: Iterable[Site],
    plan: QuantPlan,
    plain: Container[str],
    batches: Iterable[Any],
    *,
    folder: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
    floats: FloatWeights | None = None,
) -> tuple[RoundedWeights, Rounding]:
    """The codes of every weight that the plan quantizes, and a report.

    Args:
        model: the float model; it is not touched.
        sites: of it.
        plan: how they are quantized.
        plain: those whose weight is a parameter of the model as it is, not folded with others.
        batches: inputs, each as ``example_inputs`` of :meth:`Quantizer.calib`.
        folder: what is done is kept there, and found there by a later call with the same settings.
        show_progress: show a bar on stderr.
        floats: where the weights are, if not in the model. It takes the codes; of a model with one
            chain of blocks, the result has none then.

    Raises:
        InvalidConfig: there are no batches, or nothing to round; ``folder`` is of other settings.
        QuantError: a weight cannot be rounded; names the layer.
    """
    kept = list(batches)
    if not kept:
        raise InvalidConfig("round_weights got no batches; give an iterable of inputs of the model")
    twin, sites = twin_of(model), list(sites)
    wanted = _weighted(sites, plan, "linear")
    if not wanted:
        linear = [site.name for site in sites if site.op == "linear" and site.name in plan]
        first = next((f" {x}: {why};" for x in linear if (why := plan[x].reason)), "")
        raise InvalidConfig(
            f"there is no weight of a linear layer to be rounded:{first} "
            "print(quantizer.coverage(model)) says why each site stays in float"
        )
    floats = floats or FloatWeights()
    keeper = None if folder is None else Folder(folder, plan, kept, floats.checksums(model))
    run = _Run(twin, plan, plain, kept, keeper, floats)
    run.experts = [
        site
        for site in _weighted(sites, plan, "grouped_linear")
        if (method := plan[site.name].method) and method.wants_statistics
    ]
    with torch.no_grad():
        run.embeddings = rounded_embeddings(twin, _weighted(sites, plan, "embedding"), plan)
        found = run.all(run.layers(wanted), show_progress)
        check_scales(model, found[0].scaled, kept)
        return found


def _weighted(sites: Iterable[Site], plan: QuantPlan, op: str) -> list[Site]:
    """The sites of one operator whose weight is quantized."""
    return [
        site
        for site in sites
        if site.op == op and (entry := plan.get(site.name)) and entry.quantized and entry.weight
    ]


class _Run:
    """One pass through a model.

    Args:
        twin: of the model, in eval mode; its modules and parameters are replaced on the way.
        plan: how sites are quantized.
        plain: sites whose weight is a parameter as it is.
        batches: the data.
        folder: where finished blocks are kept.
        floats: where the weights are.
    """

    def __init__(
        self,
        twin: nn.Module,
        plan: QuantPlan,
        plain: Container[str],
        batches: list[Any],
        folder: Folder | None,
        floats: FloatWeights,
    ) -> None:
        self.twin, self.plan, self.plain = twin, plan, plain
        self.batches, self.folder, self.floats = batches, folder, floats
        own_buffers(twin)
        self.made = RoundedWeights()
        every = [m for _, m in twin.named_modules(remove_duplicate=False)]
        held = Counter(id(x) for m in every for x in m._parameters.values())
        self.tied = frozenset(key for key, count in held.items() if count > 1)
        """Parameters that several modules have: a scale of one would be that of the other."""
        self.embeddings: dict[nn.Module, RoundedTable] = {}
        self.experts: list[Site] = []
        """Products with the matrices of all experts, whose methods want data."""
        self.products: dict[str, list[Experts]] = {}
        """Path of a block -> those in it."""
        self.errors: list[BlockError] = []
        self.keeps = True
        """Whether codes are still needed once a block is done."""

    def layers(self, sites: Sequence[Site]) -> dict[str, Layer]:
        """Path in the model -> linear layer; of sites that one module computes, the first."""
        found: dict[str, Layer] = {}
        modules = dict(self.twin.named_modules())
        for site in sites:
            module, entry = modules.get(site.module), self.plan[site.name]
            weight = None if module is None else module._parameters.get("weight")
            plain = site.name in self.plain and weight is not None and weight.dim() == 2
            if module is None or weight is None or site.module in found or not plain:
                continue  # it is rounded without data, when the model is quantized
            transposed = not computes_linear(module, weight)
            shape = tuple(weight.T.shape if transposed else weight.shape)
            if shape != site.weight_shape or entry.weight is None:
                continue
            spec = entry.weight.on(0)
            method = entry.method or DEFAULT_METHOD
            found[site.module] = Layer(
                site.name, site.module, module, spec, method, entry.transforms, site, transposed
            )
            if late := [each for each in entry.transforms if not each.wants_blocks]:
                raise InvalidConfig(
                    f"{site.name}: {late[0]} changes the weight when the model is quantized, after "
                    "round_weights; leave it out, or take a transform that scales blocks, as AWQ"
                )
            if entry.needs_ranges and any(each.wants_blocks for each in entry.transforms):
                raise InvalidConfig(
                    f"{site.name}: {entry.transforms[0]} scales activations, whose calibrated "
                    "ranges would be wrong then; it serves float and dynamic activations only"
                )
        missed = [site.name for site in sites if site.module not in found]
        others = (each for each in self.plan.values() if each.op != "linear" and each.quantized)
        missed += [x.name for x in others if x.method and x.method.wants_blocks]
        self.made.left_out = tuple(missed)
        if missed:
            logger.warning(
                "%d weights are no parameter of a module that only multiplies by them; they are "
                "rounded to nearest: %s%s",
                len(missed), ", ".join(missed[:3]), ", ..." if len(missed) > 3 else "",
            )  # fmt: skip
        return found

    def all(self, layers: dict[str, Layer], show_progress: bool) -> tuple[RoundedWeights, Rounding]:
        """Every chain, block by block, then what lies outside."""
        from tqdm import tqdm

        chains = find_chains(self.twin, self.batches[0])
        inside = {path for chain in chains for path in chain.paths}
        rest = {
            path: layer
            for path, layer in layers.items()
            if not any(path.startswith(f"{block}.") for block in inside)
        }
        found = next((layer for layer in rest.values() if _wants_data(layer)), None)
        if self.floats.elsewhere and found is not None:
            raise InvalidConfig(
                f"{found.site} is to be rounded with data by {found.method}, and is in no block "
                "whose weights can be read by themselves: give it a format without data, "
                f'overrides={{"{found.site}": recipes.int8_weight_only()}}'
            )
        if found is None and (self.floats.elsewhere or any(map(_wants_data, layers.values()))):
            rest = {}  # rounded when the model is quantized: no second float weight of a large head
        both = any(_wants(layer, "targets", "floats") for layer in layers.values())
        total = sum(len(chain.paths) for chain in chains) + bool(rest)
        self.floats.begin(self.twin, sorted(inside))
        self.keeps = not self.floats.elsewhere or len(chains) > 1
        with tqdm(total=total, desc="rounding weights", unit="block", disable=hidden(show_progress),
                  delay=2.0, leave=False) as bar:  # fmt: skip
            for chain in chains:
                self.chain(chain, layers, both, bar)
            if rest:
                self.embed(bool(chains))
                self.outside(rest, bar)
        missed = [site.name for site in self.experts if site.name not in self.made.sites]
        if missed:
            self.made.left_out += tuple(missed)
            logger.warning(
                "the weights of experts, one tensor each, are rounded without data, as they are in "
                "no block or multiplied by something else than grouped_mm: %s%s",
                ", ".join(missed[:3]), ", ..." if len(missed) > 3 else "",
            )  # fmt: skip
        return self.made, Rounding(tuple(self.errors))

    def embed(self, rounded: bool) -> None:
        """Look tokens up in rounded embeddings, or in the model's own."""
        for module, table in self.embeddings.items():
            table.put(module, rounded)

    def chain(self, chain: Chain, layers: dict[str, Layer], both: bool, bar: Any) -> None:
        """The blocks of one chain; afterwards their results stand in their places.

        Args:
            chain: the blocks.
            layers: of the model.
            both: whether the float blocks' tensors go along.
            bar: shows progress.
        """
        floats: list[Tensor] | None = None
        if both:
            self.embed(False)
            calls = recorded(self.twin, chain, self.batches)[0].calls
            floats = [sample.hidden for sample in calls]
        self.embed(True)
        recorders = recorded(self.twin, chain, self.batches)
        self.embed(False)
        stream = [sample.hidden for sample in recorders[0].calls]
        producers: dict[str, str] | None = None
        for path, recorder in zip(chain.paths, recorders, strict=True):
            samples = [
                sample.with_hidden(x) for sample, x in zip(recorder.calls, stream, strict=True)
            ]
            mine = _inside(path, layers)
            made = Block(path, recorder.block, tuple(mine.values()), samples)
            with self.floats.lent(path, recorder.block):
                if floats is not None:
                    made.floats = [
                        sample.with_hidden(x) for sample, x in zip(samples, floats, strict=True)
                    ]
                    made.targets = [made.run(sample) for sample in made.floats]
                if any(layer.transforms for layer in mine.values()):
                    producers = made.producers = find_producers(made, self.tied, producers)
                with as_it_was(recorder.block):
                    self.block(made, bar)
                    stream = list(made.outputs())
            floats = made.targets
        for path, recorder in zip(chain.paths, recorders, strict=True):
            mine = _inside(path, layers)
            block = recorder.block
            replaced(self.twin, path, Rounded(block, partial(self.rounded, path, block, mine)))

    @contextmanager
    def rounded(self, path: str, block: nn.Module, layers: Mapping[str, Layer]) -> Iterator[None]:
        """Have a block of the twin compute with what was made of its weights."""
        with self.floats.lent(path, block), as_it_was(block):
            for name, how in self.made.scaled.items():
                if name.startswith(f"{path}."):
                    set_scaled(block, name.removeprefix(f"{path}."), how)
            for layer in (*layers.values(), *self.products.get(path, ())):
                known = self.made.sites[layer.site]
                layer.set_weight(dequantize(known.codes, known.qparams))
            yield

    def outside(self, layers: dict[str, Layer], bar: Any) -> None:
        """What lies outside of all chains: the head of a language model, or a whole small model."""
        samples = [Sample((batch,), {}, 0) for batch in self.batches]
        block = Block("", self.twin, tuple(layers.values()), samples, caller=self._called)
        if any(_wants(layer, "targets") for layer in layers.values()):
            block.targets = list(block.outputs())
        if any(layer.transforms for layer in layers.values()):
            block.producers = find_producers(block, self.tied)
        with as_it_was(self.twin):
            self.block(block, bar)

    def _called(self, batch: Any) -> Tensor:
        """The first float tensor of what the model gives for a batch."""
        return first_float(call(self.twin, batch))

    def block(self, block: Block, bar: Any) -> None:
        """Scale and round one block, or take what a folder has of it."""
        bar.set_postfix_str(block.path, refresh=False)
        start = time.monotonic()
        experts = self.products[block.path] = find_experts(block, self.experts, self.plan)
        every: tuple[Layer | Experts, ...] = (*block.layers, *experts)
        sums = {layer.site: checksum(layer.weight) for layer in every}
        sample = block.samples[0]
        exact = block.run(sample) if every else None
        found = self.folder.read(block.path, sums) if self.folder is not None else None
        if found is not None:
            found.apply(block, experts)
        else:
            scale_exactly(block)
            round_layers(block)
            round_experts(block, experts)
        mine = RoundedWeights(scaled={_joined(block.path, p): x for p, x in block.scaled.items()})
        for layer in every:
            assert layer.rounded is not None
            mine.sites[layer.site] = RoundedWeight.of(
                *layer.rounded, layer.method, sums[layer.site]
            )
            layer.rounded = None
        for each in block.layers:
            each.exact = None
        if self.folder is not None and found is None:
            self.folder.write(block.path, mine)
        self.floats.take(mine)
        if self.keeps:
            self.made.update(mine)
        names = [each.name for layer in block.layers for each in (*layer.transforms, layer.method)]
        names += [each.method.name for each in experts]
        error = math.nan if exact is None else sqnr(exact, block.run(sample))
        seconds = time.monotonic() - start
        sites = tuple(layer.site for layer in every)
        self.errors.append(
            BlockError(block.path, sites, tuple(dict.fromkeys(names)), error, seconds)
        )
        give_back()
        bar.update(1)


def round_layers(block: Block) -> None:
    """Round the weights of a block, by one method after the other."""
    for method in dict.fromkeys(layer.method for layer in block.layers):
        layers = [layer for layer in block.layers if layer.method == method]
        try:
            method.round_block(block, layers)
        except QuantError as error:
            where = block.path or "outside of blocks"
            raise QuantError(f"{where}, by {method}: {error}") from error
        if missed := [layer.site for layer in layers if layer.rounded is None]:
            raise QuantError(f"{method} has not rounded {', '.join(missed)}")


def _wants(layer: Layer, *what: str) -> bool:
    every = (*layer.transforms, layer.method)
    return any(getattr(each, f"wants_{key}") for each in every for key in what)


def _wants_data(layer: Layer) -> bool:
    method = layer.method
    return bool(layer.transforms) or method.wants_statistics or method.wants_blocks


def _inside(path: str, layers: dict[str, Layer]) -> dict[str, Layer]:
    """The layers of a block, with their paths inside of it."""
    found = {}
    for name, layer in layers.items():
        if name.startswith(f"{path}."):
            layer.path = name.removeprefix(f"{path}.")
            found[name] = layer
    return found


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}".strip(".")
