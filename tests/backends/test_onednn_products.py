"""Attention and products of activations on ONEDNN: this package's kernels in whole models."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import calibrated
from models import Compute, EncoderBlock, example, normal, seeded, tiny_transformer
from torch import Tensor, nn
from torch.nn import functional as F

import torch_quant
from torch_quant import Backend, Quantizer, QuantSpec, native, sqnr
from torch_quant.backends.reference import ReferenceBackend

pytestmark = [
    pytest.mark.sparse,
    pytest.mark.skipif(
        Backend.ONEDNN.unavailable() is not None or native.unavailable() is not None,
        reason=f"{Backend.ONEDNN.unavailable() or native.unavailable()}",
    ),
]

TOKENS = 11


def operators(model: Any) -> list[str]:
    """What the graphs of a quantized model call."""
    return [
        getattr(node.target, "_opname", str(node.target))
        for module in model.modules()
        for graph in getattr(getattr(module, "quantization", None), "graphs", ())
        for node in graph.body.graph.nodes
        if node.op == "call_function"
    ]


def on_onednn(model: nn.Module, inputs: tuple[Any, ...], **options: Any) -> Quantizer:
    return calibrated(model, [(inputs, {})], backend="onednn", **options)


def both(model: nn.Module, inputs: tuple[Any, ...], **options: Any) -> tuple[Any, Any]:
    """The model on ONEDNN, and simulated with the same plan."""
    quantizer = on_onednn(model, inputs, **options)
    simulation = ReferenceBackend(Backend.ONEDNN)
    return quantizer.quantize(model), quantizer.quantize(model, backend=simulation)


class Heads(nn.Module):
    """Projections, attention between their heads, and a projection behind it."""

    def __init__(
        self, heads: int = 4, shared: int = 4, size: int = 8, values: int = 0, **options: Any
    ) -> None:
        super().__init__()
        width = heads * size
        self.size, self.options = size, options
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key = nn.Linear(width, shared * size)
        self.value = nn.Linear(width, (values or shared) * size)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(y)), self.split(self.value(y))
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        return self.out(z.transpose(1, 2).flatten(2))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor | None]]] = {
    "plain": (Heads, lambda: None),
    "causal, other lengths": (lambda: Heads(is_causal=True), lambda: None),
    "a scale": (lambda: Heads(scale=0.7), lambda: None),
    "shared heads": (lambda: Heads(shared=2, enable_gqa=True), lambda: None),
    "shared keys": (lambda: Heads(shared=2, values=4, enable_gqa=True), lambda: None),
    "bool mask": (Heads, lambda: (torch.arange(TOKENS) < 7)[None]),
    "rows that see nothing": (
        Heads, lambda: torch.ones(2, 1, 5, TOKENS, dtype=torch.bool).tril(-3)
    ),
    "float mask": (Heads, lambda: normal(2, 1, 5, TOKENS)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_attention_agrees_with_the_reference(name: str) -> None:
    build, mask = MODELS[name]
    model = seeded(build).eval()
    inputs = (normal(2, 5, 32), normal(2, TOKENS, 32), *([] if mask() is None else [mask()]))
    found, same = both(model, inputs)
    called = operators(found)
    assert called.count("int8_attention") == 1
    # Projections give codes, attention too: nothing is rounded but the two inputs.
    assert called.count("onednn_quantize") == 2
    # A result on the border between two codes falls to either side: 40 dB is that of one in ten.
    assert sqnr(same(*inputs), found(*inputs)) > 40
    others = (normal(3, 2, 32), normal(3, 17, 32))
    if mask() is None:
        assert sqnr(same(*others), found(*others)) > 40


def test_signed_codes_and_few_bits() -> None:
    model, inputs = seeded(Heads).eval(), (normal(2, 5, 32), normal(2, TOKENS, 32))
    for spec in (QuantSpec.of("int8", symmetric=True), QuantSpec.of(bits=5)):
        found, same = both(model, inputs, qconfig=torch_quant.QConfig(spec))
        assert "int8_attention" in operators(found)
        assert sqnr(same(*inputs), found(*inputs)) > 40


def test_what_is_rounded_for_attention_alone_it_rounds_itself() -> None:
    class Rotated(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mixed = F.scaled_dot_product_attention(q * 2, k + 1, v)
            return mixed + k[:, :, :1]

    inputs = tuple(normal(2, 3, 7, 8, salt=i) for i in range(3))
    found, same = both(Rotated(), inputs)
    assert operators(found).count("onednn_quantize") == 0
    assert sqnr(same(*inputs), found(*inputs)) > 40
    seen = torch.ones(7, 7, dtype=torch.bool)
    seen[4, 1] = False  # no causal mask, though it is made alike
    own = Compute(lambda x: F.scaled_dot_product_attention(x, x + 1, x, seen.tril()))
    found, same = both(own, inputs[:1])
    assert sqnr(same(inputs[0]), found(inputs[0])) > 40
    shared = Compute(lambda x: F.scaled_dot_product_attention(x, x, x))
    found, same = both(shared, inputs[:1])
    assert sqnr(same(inputs[0]), found(inputs[0])) > 40


class Written(nn.Module):
    """Attention as two products."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        p = torch.softmax(q @ k.transpose(-2, -1) / 4, -1)
        return torch.matmul(p, v).tanh() + torch.bmm(p, v)


def test_products_agree_with_the_reference() -> None:
    model, x = seeded(Written).eval(), normal(3, 7, 16)
    found, same = both(model, (x,))
    assert operators(found).count("int8_matmul") == 3
    assert sqnr(same(x), found(x)) > 40
    assert sqnr(same(normal(5, 4, 16)), found(normal(5, 4, 16))) > 40


VECTORS = {
    "two vectors": (lambda x, y: x @ y, (5,), (5,)),
    "a vector on the left": (lambda x, y: x @ y, (5,), (5, 3)),
    "a vector on the right": (lambda x, y: x @ y, (2, 3, 5), (5,)),
}


@pytest.mark.parametrize("name", VECTORS)
def test_products_with_vectors(name: str) -> None:
    function, *shapes = VECTORS[name]
    x, y = (normal(*shape, salt=i) for i, shape in enumerate(shapes))
    model = Compute(lambda x, y: function(x.tanh(), y.tanh()))
    found, same = both(model, (x, y))
    torch.testing.assert_close(found(x, y), same(x, y), rtol=1e-5, atol=1e-5)


def test_coverage_shows_them_and_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_transformer(), example("tiny_transformer")
    quantizer = on_onednn(model, inputs)
    quantizer.quantize(model)
    assert quantizer.plan.coverage == 1.0
    monkeypatch.setattr(native, "unavailable", lambda: "the kernels are not built")
    refused = on_onednn(model, inputs)
    refused.quantize(model)
    reason = refused.plan["blocks.0.scaled_dot_product_attention"].reason
    assert "products of two activations run on this package's kernels" in reason
    assert "the kernels are not built" in reason


def test_saved_copied_traced_compiled_and_exported(tmp_path: Path) -> None:
    model, inputs = tiny_transformer(), example("tiny_transformer")
    found = on_onednn(model, inputs).quantize(model)
    expected = found(*inputs)
    assert torch.equal(copy.deepcopy(found)(*inputs), expected)
    buffer = io.BytesIO()
    torch.save(found, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(*inputs), expected)
    torch_quant.save(found, tmp_path / "saved")
    assert torch.equal(
        torch_quant.load(tmp_path / "saved", model=tiny_transformer())(*inputs), expected
    )
    with torch.no_grad():
        exported = torch.export.export(found, inputs).module()
        assert torch.equal(exported(*inputs), expected)
        scripted = torch_quant.export_torchscript(found, inputs, tmp_path / "model.pt")
        assert torch.equal(scripted(*inputs), expected)
        other = tuple(x[:1, :4] for x in inputs)
        assert torch.equal(scripted(*other), found(*other))
        compiled = torch.compile(found, backend="aot_eager", dynamic=True)
        assert torch.equal(compiled(*inputs), expected)
        assert torch.equal(compiled(*other), found(*other))


def test_other_sizes_and_threads_after_the_first() -> None:
    block = seeded(lambda: EncoderBlock(32, 4)).eval()
    found = on_onednn(block, (normal(2, 9, 32),)).quantize(block)
    before = torch.get_num_threads()
    inputs = [normal(batch, length, 32) for batch, length in ((2, 9), (1, 1), (3, 130), (2, 9))]
    try:
        torch.set_num_threads(1)
        one = [found(x) for x in inputs]
        torch.set_num_threads(2)
        two = [found(x) for x in inputs]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], one[3])
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # norms are summed by threads


def test_float_sites_stay_float() -> None:
    model, inputs = seeded(Heads).eval(), (normal(2, 5, 32), normal(2, TOKENS, 32))
    found, same = both(model, inputs, overrides={"op:scaled_dot_product_attention": None})
    assert "int8_attention" not in operators(found)
    assert sqnr(same(*inputs), found(*inputs)) > 40


HUB = {
    "bert": lambda t: t.BertModel(t.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=32)),
    "llama": lambda t: t.LlamaModel(t.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=32, use_cache=False)),
    "vit": lambda t: t.ViTModel(t.ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64)),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_models_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = seeded(lambda: HUB[name](transformers)).eval()
    x = normal(2, 3, 16, 16) if name == "vit" else torch.arange(24).reshape(2, 12) % 50
    with torch.no_grad():
        found, same = both(model, (x,))
        assert operators(found).count("int8_attention") == 1
        a, b = found(x).last_hidden_state, same(x).last_hidden_state
    # Codes on a border fall to either side, and a layer multiplies what that makes.
    assert sqnr(b, a) > 28
