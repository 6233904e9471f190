"""Weight-only and dynamic layers on ONEDNN: this package's kernels in whole models."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import check_workflow
from flows import calibrated
from models import normal, seeded, tokens
from thinning import rarely
from torch import Tensor, nn

import torch_quant
from torch_quant import (
    FLOAT,
    Backend,
    PerChannel,
    PerGroup,
    PerToken,
    QConfig,
    Quantizer,
    QuantSpec,
    native,
    recipes,
    sqnr,
)

pytestmark = pytest.mark.skipif(
    Backend.ONEDNN.unavailable() is not None,
    reason=f"Backend.ONEDNN: {Backend.ONEDNN.unavailable()}; run on an x86 CPU",
)


def weights(
    element: str, group: int | None = None, symmetric: bool | None = None, *, floats: bool = False
) -> QConfig:
    granularity = PerChannel() if group is None else PerGroup(group)
    spec = QuantSpec.of(
        element, symmetric=symmetric, granularity=granularity, float_zero_points=floats
    )
    return QConfig(FLOAT, spec)


FORMATS: dict[str, tuple[QConfig, str, float]] = {
    "int4, groups of 32": (recipes.int4_weight_only(group_size=32), "int4 weights", 34.0),
    "int4, groups of 64": (recipes.int4_weight_only(group_size=64), "int4 weights", 34.0),
    "int4 per channel": (recipes.int4_weight_only(group_size=None), "int4 weights", 34.0),
    "int4 affine": (
        recipes.int4_weight_only(group_size=32, symmetric=False), "int4 weights", 34.0
    ),
    "int4, float zero points": (
        recipes.int4_weight_only(group_size=32, symmetric=False, float_zero_points=True),
        "int4 weights", 34.0,
    ),
    "int8, float zero points": (weights("uint8", 64, floats=True), "int8 weights", 75.0),
    "int4 affine, signed": (weights("int4", 32, False), "int4 weights", 34.0),
    "uint4 symmetric": (weights("uint4", 64, True), "int4 weights", 34.0),
    "int4 of 15 values": (weights("int4[-7, 7]", 64), "int4 weights", 34.0),
    "int2": (weights("int2", 32), "int2 weights", 34.0),
    "int3 affine": (weights("uint3", 32), "int3 weights", 34.0),
    "int6": (weights("int6", 64), "int6 weights", 75.0),
    "int8 per channel": (recipes.int8_weight_only(), "int8 weights", 75.0),
    "int8, groups of 32": (recipes.int8_weight_only(group_size=32), "int8 weights", 75.0),
    "int8 affine": (weights("uint8", 64), "int8 weights", 75.0),
    "dynamic": (recipes.int8_dynamic(), "int8", 110.0),
    "dynamic, signed": (recipes.int8_dynamic(symmetric=True), "int8", 110.0),
}  # fmt: skip
"""Format, its name in reports, and the least SQNR against the reference, dB: what rounding
activations to 8 bits, to 15 bits, and to the very same codes leaves behind two layers."""


def net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 33))).eval()


def targets(model: Any) -> list[str]:
    return [
        getattr(node.target, "_opname", "")
        for module in model.modules()
        for graph in getattr(getattr(module, "quantization", None), "graphs", ())
        for node in graph.body.graph.nodes
        if node.op == "call_function"
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_formats_agree_with_the_reference(name: str) -> None:
    config, words, least = FORMATS[name]
    x, model = normal(16, 128), net()
    quantizer = Quantizer("onednn", qconfig=config)
    quant_model = quantizer.quantize(model, example_inputs=x)
    reference = Quantizer("reference", qconfig=config).quantize(model, example_inputs=x)
    assert sqnr(reference(x), quant_model(x)) > least
    operator = "dynamic_linear" if words == "int8" else "weight_only_linear"
    assert targets(quant_model).count(operator) == 2
    assert quantizer.plan.formats == {words: 1.0}
    preposition = "in" if words == "int8" else "with"
    text = f"100.0% of the multiply-accumulates {preposition} {words}, 2 of 2 sites"
    assert text in str(quantizer.coverage(model))
    explained = quantizer.explain("0")
    assert str(explained).startswith(f"0 (linear) on Backend.ONEDNN: {words}\n")
    assert ("activations are rounded inside" in explained["quantized"].why) == (words != "int8")


@pytest.mark.parametrize(
    "name", ["int4 affine", "int4, float zero points", "int8 per channel", "dynamic"]
)
def test_the_whole_workflow(name: str, tmp_path: Path) -> None:
    config, _, _ = FORMATS[name]
    options: dict[str, Any] = {"backend": "onednn", "qconfig": config, "capture": "whole"}
    check_workflow(net(), ((normal(32, 128),), {}), "0", tmp_path, least=15.0, **options)


@pytest.mark.parametrize(
    "name",
    ["int4, groups of 64", "int4 affine", "int4, float zero points", "int8 affine", "dynamic"],
)
def test_saved_traced_exported_and_copied(name: str, tmp_path: Path) -> None:
    config, _, _ = FORMATS[name]
    x, model = normal(8, 128), net()
    quantizer = calibrated(model, [((x,), {})], backend="onednn", qconfig=config, capture="whole")
    quant_model = quantizer.quantize(model)
    expected = quant_model(x)
    torch_quant.save(quant_model, tmp_path / "model")
    assert torch.equal(torch_quant.load(tmp_path / "model")(x), expected)
    traced = io.BytesIO()
    torch.jit.save(torch.jit.freeze(torch.jit.trace(quant_model, (x,))), traced)
    traced.seek(0)
    loaded = torch.jit.load(traced)
    assert torch.equal(loaded(x), expected)
    assert torch.equal(loaded(x[:3]), expected[:3])  # a row's result is its own
    batch = torch.export.Dim("batch")
    exported = torch.export.export(quant_model, (x,), dynamic_shapes=({0: batch},))
    assert torch.equal(exported.module()(x[:3]), expected[:3])
    compiled = torch.compile(exported.module(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)


def test_tensors_of_the_model() -> None:
    """int4 takes half a byte for a code: 0.14 of float32 with groups of 128."""
    layer = nn.Linear(1024, 512, bias=False)
    model = seeded(lambda: nn.Sequential(layer)).requires_grad_(False)
    config = recipes.int4_weight_only()
    quant_model = Quantizer("onednn", qconfig=config).quantize(
        model, example_inputs=normal(2, 1024)
    )
    state = {name: (x.dtype, tuple(x.shape)) for name, x in quant_model.state_dict().items()}
    assert state == {
        "0.weight": (torch.uint8, (512, 512)), "0.weight_scale": (torch.float32, (512, 8))
    }  # fmt: skip
    share = sum(x.nbytes for x in quant_model.state_dict().values()) / layer.weight.nbytes
    assert share == 0.5 / 4 + 1 / 128


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (weights("int4", 48), "per group of a multiple of 32 inputs, not s4 symmetric per-group"),
        (weights("float8_e4m3fn"), "weights are integers of up to 8 bits"),
        (weights("int12"), "weights are integers of up to 8 bits"),
        (
            QConfig(QuantSpec.of("uint8", granularity=PerGroup(32), dynamic=True)),
            "dynamic activations are uint8, or symmetric int8, with a scale per token",
        ),
        (
            QConfig(QuantSpec.of("int4", granularity=PerToken(), dynamic=True)),
            "dynamic activations are uint8, or symmetric int8, with a scale per token",
        ),
    ],
    ids=["groups of 48", "float8", "int12", "groups of activations", "int4 tokens"],
)
def test_formats_without_a_kernel_stay_in_float(config: QConfig, why: str) -> None:
    quantizer = Quantizer("onednn", qconfig=config)
    model = nn.Sequential(nn.Linear(96, 8)).eval()
    report = quantizer.coverage(model, normal(2, 96))
    assert report.share == 0.0
    assert why in report.reasons["0"]


def test_weights_of_few_bits_go_with_float_activations() -> None:
    """Activations of a configuration that does not speak of them are quantized, or nothing is."""
    quantizer = Quantizer("onednn", qconfig=QConfig(weight=FORMATS["int4 affine"][0].weight))
    report = quantizer.coverage(net(), normal(2, 128))
    assert report.share == 0.0
    assert "go with float activations, QConfig(FLOAT, weight), not u8" in report.reasons["0"]


def test_sums_that_do_not_fit_are_not_dynamic() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(65537, 16)).eval().requires_grad_(False)
    quantizer = Quantizer("onednn", qconfig=recipes.int8_dynamic())
    x = normal(2, 65537)
    assert sqnr(model(x), quantizer.quantize(model, example_inputs=x)(x)) > 30.0
    assert "sums of more than 65536 inputs" in quantizer.coverage(model, x).reasons["0"]


def test_mixed_formats_are_told_apart() -> None:
    model = net()
    overrides = {"2": recipes.int8_weight_only()}
    quantizer = Quantizer("onednn", qconfig=recipes.int4_weight_only(), overrides=overrides)
    summary = str(quantizer.coverage(model, normal(2, 128)))
    assert (
        "100.0% of the multiply-accumulates quantized "
        "(79.5% with int4 weights, 20.5% with int8 weights), 2 of 2 sites"
    ) in summary
    assert "int4 weights; int8 weights" in summary


class Tied(nn.Module):
    """Reads its table in two ways, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3000, 64)
        self.head = nn.Linear(64, 3000, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(x))
        return logits


@pytest.mark.parametrize("capture", ["modules", "whole"])
@pytest.mark.parametrize("name", ["int4, groups of 32", "int4 affine", "int8 per channel"])
def test_tied_weights_are_stored_once(name: str, capture: str, tmp_path: Path) -> None:
    config, _, least = FORMATS[name]
    model, x = seeded(Tied), tokens(2, 7, 3000)
    quant_model = Quantizer("onednn", qconfig=config, capture=capture).quantize(
        model, example_inputs=x
    )
    reference = Quantizer("reference", qconfig=config, capture=capture).quantize(
        model, example_inputs=x
    )
    assert sqnr(reference(x), quant_model(x)) > least
    codes = [x for name, x in quant_model.state_dict().items() if x.dtype is not torch.float32]
    assert len({x.data_ptr() for x in codes if x.shape[1] > 2}) == 1
    torch_quant.save(quant_model, tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < 1.2 * sum({x.data_ptr(): x.nbytes for x in codes}.values()) + 40_000


@pytest.mark.skipif(not native.instruction_sets(), reason=f"{native.unavailable()}")
@pytest.mark.parametrize("outliers", [1.0, 30.0, 300.0])
@pytest.mark.parametrize(
    "name", ["int4, groups of 64", "int4 per channel", "int8 per channel", "int8, groups of 32"]
)
def test_what_rounding_activations_costs(name: str, outliers: float) -> None:
    """Heavy-tailed activations, some channels far larger, as in language models: what rounding them
    adds lies 15 dB below the noise that the weights have from their own rounding."""
    config, _, _ = FORMATS[name]
    layer = seeded(lambda: nn.Sequential(nn.Linear(1024, 256, bias=False))).requires_grad_(False)
    x = torch.distributions.StudentT(4.0).sample((64, 1024))
    x[:, ::97] *= outliers
    exact = Quantizer("reference", qconfig=config).quantize(layer, example_inputs=x)(x)
    found = Quantizer("onednn", qconfig=config).quantize(layer, example_inputs=x)(x)
    assert sqnr(exact, found) - sqnr(layer(x), exact) > 15.0


@pytest.mark.parametrize("name", ["int4, groups of 32", rarely("int4 per channel"),
                                  rarely("int8 per channel"), "dynamic"])  # fmt: skip
def test_a_language_model_generates(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config, _, least = FORMATS[name]
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    llama = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, pad_token_id=0, eos_token_id=None,
        tie_word_embeddings=True, **sizes,
    )  # fmt: skip
    model = seeded(lambda: transformers.LlamaForCausalLM(llama)).requires_grad_(False)
    ids = tokens(2, 9, 99) + 1
    options: dict[str, Any] = {"qconfig": config, "capture": "modules"}
    quant_model: Any = Quantizer("onednn", **options).quantize(model, example_inputs=ids)
    reference: Any = Quantizer("reference", **options).quantize(model, example_inputs=ids)
    logits, expected = quant_model(ids).logits, reference(ids).logits
    assert sqnr(expected, logits) > least - 8.0  # through two blocks
    assert set(targets(quant_model)) & {"weight_only_linear", "dynamic_linear"}
    made = quant_model.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=ids > 0)
    assert made.shape == (2, 13)
    torch_quant.save(quant_model, tmp_path)
    loaded: Any = torch_quant.load(tmp_path, model=transformers.LlamaForCausalLM(llama))
    assert torch.equal(loaded(ids).logits, logits)
    assert torch.equal(
        loaded.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=ids > 0), made
    )
