"""PyTorch's compiler as a backend: calls, numbers, what is fused, copies, what fails."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import calibrated
from models import images, normal, seeded
from runtimes import Everything, check_calls_of_any_form, compiled, everything
from thinning import LONG, OLDEST
from torch import Tensor, nn

import torch_quant
from torch_quant import (
    Backend,
    BackendUnavailable,
    InvalidConfig,
    QConfig,
    Quantizer,
    QuantSpec,
    sqnr,
)
from torch_quant.backends import InductorBackend, ReferenceBackend
from torch_quant.backends.inductor.sizes import has_one_within, widened
from torch_quant.convert.exporting import exported_at_once

MISSING = Backend.INDUCTOR.unavailable()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"Backend.INDUCTOR: {MISSING}")


def meant(quantizer: Quantizer, model: nn.Module) -> Any:
    return quantizer.quantize(model, backend=ReferenceBackend(Backend.INDUCTOR))


@pytest.mark.skipif(
    OLDEST,
    reason="Inductor of torch 2.8 writes C++ for numbers among the inputs that does not compile, "
    "and the graph runs in PyTorch: use a newer one",
)
def test_calls_of_any_form_and_size() -> None:
    """Compiled once; inputs and outputs are those of the model, and numbers are inputs."""
    model = seeded(Everything)
    quantizer = calibrated(model, [everything(4), everything(6)], backend="inductor")
    quant_model, reference = quantizer.quantize(model), meant(quantizer, model)
    x, mask, other = check_calls_of_any_form(quant_model, reference)
    wide = torch.zeros(7, 5, 40)
    wide[:, :, 3:19] = x
    torch.testing.assert_close(quant_model(wide[:, :, 3:19], mask, scale=0.5)["again"], other)
    assert len(compiled(quant_model).opened) == 1


class Convs(nn.Module):
    """By depth, by name and with zeros around; functions, a residual sum, a mean, a window."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16)
        self.depth, self.point = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)
        self.even = nn.Conv2d(16, 16, 4, padding="same")
        self.pool = nn.AvgPool2d((100, 1), ceil_mode=True)
        self.line, self.head = nn.Conv1d(16, 24, 3, padding=1), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(nn.functional.pad(x, (0, 1, 0, 1)))).relu()
        x = x + nn.functional.hardswish(self.point(nn.functional.relu6(self.depth(x))))
        x = self.pool(self.even(x))
        return self.head(self.line(x.flatten(2)).relu().mean(-1))


EVEN = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.mark.long("the compiler works for ten seconds")
@EVEN
def test_convolutions_and_signed_activations_are_fused(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model = seeded(Convs).eval()
    signed = QConfig(input=QuantSpec.of(bits=8, signed=True, symmetric=True))
    quantizer = Quantizer("inductor", overrides={"point": signed})
    quantizer.calib(model)(images(16, 32))
    quant_model, reference = quantizer.quantize(model), meant(quantizer, model)
    assert {name for name, site in quantizer.plan.items() if not site.quantized} == {"line"}
    batches = (4, 1, 7) if LONG else (4,)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        for batch in (*batches, 4):
            x = images(batch, 32)
            assert sqnr(reference(x), quant_model(x)) > 60
            assert sqnr(model(x), quant_model(x)) > 20
    told = [each.message for each in caplog.records if each.name == "torch_quant"]
    assert ["makes a session for each size" in each for each in told] == [True]  # none in float
    assert len(compiled(quant_model).opened) == len(batches)
    assert copy.deepcopy(quant_model).graphs[0].compiled is None
    torch_quant.save(quant_model, tmp_path)
    again = torch_quant.load(tmp_path)
    assert "INDUCTOR" in repr(again)
    with pytest.raises(InvalidConfig, match="compiles its kernels with the weights"):
        again.load_state_dict(quant_model.state_dict())


class Attending(nn.Module):
    """Attention without the first token, and a mask beside a product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, length, 3, 2, 8)[:, 1:].permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2)
        return (x[:, 1:] > 0) + self.out(self.out(found.flatten(2)).tanh())


@pytest.mark.long("ten seconds of a C++ compiler")
def test_the_first_call_does_not_matter(caplog: pytest.LogCaptureFixture) -> None:
    """One text under autocast; then others; then one of a token, of which attention has none."""
    model = seeded(Attending)
    quantizer = calibrated(model, [((normal(4, 7, 16),), {})], backend="inductor")
    quant_model, reference = quantizer.quantize(model), meant(quantizer, model)
    with torch.autocast("cpu", torch.bfloat16):
        assert quant_model(normal(1, 5, 16)).dtype is torch.float32
    for shape in ((1, 5), (4, 7), (3, 2), (9, 40)):
        x = normal(*shape, 16)
        assert sqnr(reference(x), quant_model(x)) > 60
    assert quant_model(normal(2, 1, 16)).shape == (2, 0, 16)
    assert "run in float" not in caplog.text  # nor does a layer that is called twice
    assert len(compiled(quant_model).opened) == 1
    x = normal(3, 4, 7, 16)
    assert sqnr(reference(x[0]), torch.func.vmap(quant_model)(x)[0]) > 60


ONE_GRAPH = pytest.mark.skipif(
    OLDEST, reason="torch 2.8 captures images that leave one row apart; run on the newest torch"
)


def tall() -> nn.Module:
    """A convolution as high as the smallest image."""
    return seeded(
        lambda: nn.Sequential(nn.Conv2d(12, 24, (7, 3), padding=(0, 1), groups=12), nn.ReLU())
    )


@ONE_GRAPH
def test_nothing_has_size_1_in_an_example_of_free_sizes() -> None:
    """Compiled for it, Inductor gives one row for images of any height."""
    model = tall()
    batches = [((normal(2, 12, height, 9),), {}) for height in (7, 9)]
    (graph,) = calibrated(model, batches, backend="inductor").quantize(model).graphs
    examples = list(widened(graph, batches[0][0]))
    assert [tuple(x.shape) for (x,) in examples] == [
        (4, 12, 7, 9),
        (8, 12, 14, 18),
        (16, 12, 28, 36),
    ]
    found = [has_one_within(exported_at_once(graph, each, "oblivious")) for each in examples[:2]]
    assert found == [True, False]


@ONE_GRAPH
@pytest.mark.long("ten seconds of a C++ compiler")
def test_the_height_of_the_first_image_does_not_matter() -> None:
    model = tall()
    batches = [((normal(2, 12, height, 9),), {}) for height in (7, 9)]
    quantizer = calibrated(model, batches, backend="inductor")
    quant_model, reference = quantizer.quantize(model), meant(quantizer, model)
    for height, width in ((7, 9), (9, 9), (30, 5)):
        x = normal(2, 12, height, width)
        assert sqnr(reference(x), quant_model(x)) > 60
    assert len(compiled(quant_model).opened) == 1


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) + self.layer(x).transpose(0, 1) + self.layer(x.transpose(0, 1))


@EVEN
def test_graphs_in_the_form_that_is_fused_well() -> None:
    """Sums beside a product, whose operand may lie the other way round; paddings in numbers."""
    model = seeded(Residual)
    quantizer = calibrated(model, [((normal(6, 5, 16),), {})], backend="inductor")
    (graph,) = quantizer.quantize(model).graphs
    targets = [node.target for node in graph.body.graph.nodes]
    assert targets.count(torch.ops.aten.sub.Tensor) == 1  # the transposed product is another's
    assert torch.equal(graph.body(normal(3, 2, 16))[0], meant(quantizer, model)(normal(3, 2, 16)))
    assert not Backend.INDUCTOR.fixes_sizes(graph)
    assert InductorBackend(dynamic=False).fixes_sizes(graph)
    assert repr(InductorBackend(dynamic=False)) == "Backend.INDUCTOR with dynamic=False"
    with pytest.raises(InvalidConfig, match="dynamic='no'"):
        InductorBackend(dynamic="no")  # type: ignore[arg-type]
    convs = seeded(Convs).eval()
    (graph,) = (
        calibrated(convs, [((images(4, 32),), {})], backend="inductor").quantize(convs).graphs
    )
    assert Backend.INDUCTOR.fixes_sizes(graph)
    assert not InductorBackend(dynamic=True).fixes_sizes(graph)
    args = {
        node.args[1].args[0].target.partition(".")[0]: node.args[3:6]
        for node in graph.body.graph.find_nodes(
            op="call_function", target=torch.ops.aten.conv2d.default
        )
    }
    assert args["stem"] == ([2, 2], [0, 0], [1, 1])
    assert args["even"] == ([1, 1], [1, 1], [1, 1])  # and a row and a column of codes more


def test_it_can_be_exported_as_what_it_computes() -> None:
    """Without a compiler: the graph itself, in operators of PyTorch."""
    model, x = seeded(lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU())), normal(4, 16)
    quant_model = calibrated(model, [((normal(32, 16),), {})], backend="inductor").quantize(model)
    program = torch.export.export(quant_model, (x,))
    assert torch.equal(program.module()(x), quant_model.graphs[0].body(x)[0])
    with pytest.raises(InvalidConfig, match=r"export_inductor\(...\) writes a package"):
        torch_quant.export_torchscript(quant_model, x, "model.pt")


def test_a_compiler_that_fails_is_quoted_and_the_graph_runs_in_pytorch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = seeded(lambda: nn.Linear(16, 8)), normal(4, 16)
    backend = InductorBackend(settings={"no_such_setting": True})
    quantizer = calibrated(model, [((normal(32, 16),), {})], backend=backend)
    quant_model = quantizer.quantize(model)
    assert "settings={'no_such_setting': True}" in repr(quantizer)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        assert torch.equal(quant_model(x), meant(quantizer, model)(x))
        quant_model(x)
    (told,) = (each for each in caplog.messages if "INDUCTOR" in each)
    assert "runs in PyTorch, in float arithmetic: Inductor does not compile it" in told
    assert "no_such_setting" in told


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendUnavailable, match=r"there is no no-such-compiler: install one"):
        Quantizer("inductor")
