"""A new transform: one frozen dataclass that rewrites the float graph before it is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from contract import check_workflow
from models import seeded
from torch import Tensor, nn

from torch_quant import QConfig, Quantizer, SmoothQuant, Transform, register_transform, sqnr
from torch_quant.core.granularity import PerChannel
from torch_quant.core.methods import Wanted
from torch_quant.graph.sites import KEY, Site, find_sites, local_name
from torch_quant.passes.base import PassContext
from torch_quant.passes.constants import evaluate, new_constant
from torch_quant.statistics import CHANNELS, RANGE, MinMaxObserver


@dataclass(frozen=True)
class Centred(Transform):
    """Subtract the middle of each channel from a linear layer's input; its bias makes up for it."""

    name = "centred"

    def refusal(self, site: Site) -> str:
        return "" if site.smoothable else "only linear layers on channels can be centred"

    def statistics(self, site: Site) -> Wanted:
        return {site.inputs[0]: {CHANNELS: partial(MinMaxObserver, PerChannel(-1))}}

    def apply(self, context: PassContext) -> int:
        aten = torch.ops.aten
        changed = 0
        for node, _, site in list(find_sites(context.graph)):
            entry = context.plan[site.name]
            if not entry.quantized or self not in entry.transforms:
                continue
            x, weight, bias = (*node.args, None)[:3]
            key = site.inputs[0]
            channels = context.statistic(key, CHANNELS)
            assert isinstance(channels, MinMaxObserver)
            low, high = channels.min_val.flatten(), channels.max_val.flatten()
            middle = (low + high) / 2
            half = (high - low) / 2
            found = {RANGE: MinMaxObserver(), CHANNELS: MinMaxObserver(PerChannel(-1))}
            for each in found.values():
                each.observe(torch.stack([-half, half]))
            context.derive(f"{key}[centred]", found)
            offset = evaluate(context.gm, weight).detach() @ middle
            if bias is not None:
                offset = offset + evaluate(context.gm, bias).detach()
            local = local_name(node)
            constant = new_constant(context.gm, f"{local}.middle", middle, node)
            constant.meta["val"] = middle
            with context.graph.inserting_before(node):
                centred = context.graph.call_function(aten.sub.Tensor, (x, constant))
            centred.meta = {**x.meta, KEY: f"{key}[centred]"}
            node.args = (centred, weight, new_constant(context.gm, f"{local}.bias", offset, node))
            changed += 1
        return changed


class Shifted(nn.Module):
    """A layer whose inputs lie far from 0, each channel elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 8)
        self.register_buffer("where", torch.linspace(-40.0, 40.0, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x) + self.where)


def test_a_transform_is_one_class(tmp_path: Path) -> None:
    register_transform(Centred)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    model = seeded(Shifted)
    plain = Quantizer("reference")
    plain.calib(model)(x)
    before = sqnr(model(x), plain.quantize(model)(x))
    quantizer, quant_model = check_workflow(
        model,
        ((x,), {}),
        "head",
        tmp_path,
        backend="reference",
        qconfig=QConfig(transforms=[Centred()]),
    )
    assert sqnr(model(x), quant_model(x)) > before + 10.0
    again = Quantizer.from_config(quantizer.to_config())
    assert again.qconfig == quantizer.qconfig
    again.calib(model)(x)
    assert again.explain("head")["centred"].value == Centred()


def test_it_serves_kernels_too_and_in_a_row_with_another() -> None:
    """SmoothQuant divides what is left of the channels when their middles are gone."""
    register_transform(Centred)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 30.0
    model = nn.Linear(16, 8)
    for transforms in ([Centred()], [SmoothQuant(0.5), Centred()]):
        quantizer = Quantizer("onednn", qconfig=QConfig(transforms=transforms))
        quantizer.calib(model)(x)
        assert sqnr(model(x), quantizer.quantize(model)(x)) > 25.0
        assert quantizer.plan.quantized
