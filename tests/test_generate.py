"""``generate()`` of language models on proxies and on quantized models, which are twins of them."""

from __future__ import annotations

import copy
import gc
import io
import sys
import weakref
from typing import Any

import pytest
import torch
from flows import BACKENDS, calibrated
from models import normal, seeded, tokens
from test_decoding import HEADS, VOCABULARY, _causal, _seq2seq
from thinning import some
from torch import Tensor, nn

from torch_quant import CaptureFailed, Quantizer, sqnr

NEW = 6
LAYERS = {"num_hidden_layers": 1}
MODELS = {
    "llama": _causal("LlamaForCausalLM", **HEADS, **LAYERS),
    "gpt2": _causal("GPT2LMHeadModel", **LAYERS),
    "qwen2": _causal("Qwen2ForCausalLM", **HEADS, **LAYERS),
    "t5": _seq2seq(
        "T5ForConditionalGeneration", d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4,
    ),
    "whisper": _seq2seq(
        "WhisperForConditionalGeneration", d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=16, max_target_positions=32,
        bos_token_id=1, eos_token_id=2, suppress_tokens=None, begin_suppress_tokens=None,
    ),
}  # fmt: skip


def taught(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model that has learned how two prompts go on, and the prompts.

    A model with random weights is as good as undecided between the first two tokens, and the
    least rounding decides. This one is sure: its margins are several times what int8 changes.
    """
    model = MODELS[name]()
    texts = tokens(2, 5 + NEW, VOCABULARY - 3) + 3  # none of the special tokens
    inputs = {
        "t5": lambda: {"input_ids": tokens(2, 7, VOCABULARY)},
        "whisper": lambda: {"input_features": normal(2, 8, 32)},
    }.get(name, dict)()
    key = "decoder_input_ids" if inputs else "input_ids"
    norms = any(isinstance(each, nn.LayerNorm) for each in model.modules())
    if norms and "intel_extension_for_pytorch" in sys.modules:
        pytest.skip("IPEX takes the gradient of layer norms away: run in a process without it")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with torch.enable_grad():
        for _ in range(60):
            logits = model(**inputs, **{key: texts[:, :-1]}).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # as many tokens as are asked for
    model.generation_config.pad_token_id = 0
    model.generation_config.max_length = None
    return model, {**inputs, key: texts[:, :5]}


def generated(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return found


@pytest.mark.parametrize("name", some(MODELS, "llama", "t5"))
@torch.no_grad()
def test_proxies_and_quantized_models_generate(name: str) -> None:
    model, inputs = taught(name)
    expected = generated(model, inputs)
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    assert torch.equal(generated(calib_model, inputs), expected)
    assert isinstance(calib_model, type(model))
    assert calib_model.config is model.config
    encoder = model.get_encoder() if model.config.is_encoder_decoder else None
    for backend in sorted({"reference", "onednn"} & set(BACKENDS)):
        quant_model: Any = quantizer.quantize(model, backend=backend)
        assert isinstance(quant_model, type(model))
        assert quant_model.config is model.config
        assert (quant_model.device, quant_model.dtype) == (model.device, model.dtype)
        assert torch.equal(generated(quant_model, inputs), expected)
        if encoder is not None:
            states = encoder(inputs[model.main_input_name])[0]
            found = quant_model.get_encoder()(inputs[model.main_input_name])[0]
            assert not torch.equal(found, states)  # in int8, and as good as int8 is
            assert sqnr(states, found) > 20


@pytest.mark.newest("four seconds")
@torch.no_grad()
def test_an_encoder_that_was_never_called_alone_is_captured_when_it_is() -> None:
    model, inputs = taught("t5")
    batch = inputs | {"decoder_input_ids": inputs["decoder_input_ids"]}
    quantizer = calibrated(model, [((), batch)], backend="reference")
    quant_model: Any = quantizer.quantize(model)

    def size() -> int:  # but for the embedding, which is tied and has two names
        state = quant_model.state_dict().items()
        return sum(x.nbytes for name, x in state if "embed" not in name)

    before = size()
    found = quant_model.get_encoder()(inputs["input_ids"])[0]
    expected = model.get_encoder()(inputs["input_ids"])[0]
    assert not torch.equal(found, expected)
    assert sqnr(expected, found) > 20
    assert size() == before  # the same weights
    strict: Any = calibrated(
        model, [((), batch)], backend="reference", unseen_calls="error"
    ).quantize(model)
    with pytest.raises(CaptureFailed, match="encoder was never called by itself"):
        strict.get_encoder()(inputs["input_ids"])


class Speaker(nn.Module):
    """What a class may have beside a forward."""

    volume = 1.0
    words: list[str] = []  # noqa: RUF012 - a default that instances replace

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.words = ["one", "two"]
        self.body = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.shift = nn.Parameter(torch.full((width,), 0.5))
        self.chosen = self.loud

    @property
    def doubled(self) -> int:
        return 2 * self.width

    @classmethod
    def named(cls) -> str:
        return cls.__name__

    def loud(self, x: Tensor) -> Tensor:
        return self(x) * self.volume

    def shifted(self, x: Tensor) -> Tensor:
        return self(x) + self.shift

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quantized_model_is_a_twin(backend: str) -> None:
    model, x = seeded(Speaker).eval(), normal(8, 16)
    quantizer = Quantizer(backend)
    calib_model: Any = quantizer.calib(model)
    assert torch.equal(calib_model.shifted(x), model.shifted(x))
    quant_model: Any = quantizer.quantize(model)
    for each in (calib_model, quant_model):
        assert isinstance(each, Speaker)
        assert (each.width, each.doubled, each.words) == (16, 32, ["one", "two"])
        assert isinstance(each.body[0], nn.Linear)
        assert each.body[0].in_features == 16
        with pytest.raises(AttributeError, match="no attribute 'absent'"):
            _ = each.absent
        each.volume = 3.0
        assert model.volume == Speaker.volume == 1.0
        assert torch.equal(each.loud(x), each(x) * 3)
        assert torch.equal(each.chosen(x), each(x) * 3)
        assert torch.equal(each.shifted(x), each(x) + 0.5)
    assert (type(quant_model).words, type(quant_model).named()) == ([], "Speaker")
    other = copy.deepcopy(quant_model)
    other.volume = 5.0
    assert quant_model.volume == 3.0
    assert torch.equal(other.loud(x), quant_model(x) * 5)
    file = io.BytesIO()
    torch.save(quant_model, file)
    file.seek(0)
    loaded: Any = torch.load(file, weights_only=False)
    assert isinstance(loaded, Speaker)
    assert torch.equal(loaded.loud(x), quant_model.loud(x))


def test_a_copy_computes_with_its_own_tensors() -> None:
    model, x = seeded(Speaker).eval(), normal(8, 16)
    quant_model: Any = calibrated(model, [((x,), {})], backend="reference").quantize(model)
    expected = quant_model(x)
    other = copy.deepcopy(quant_model)
    with torch.no_grad():
        other.body[2].bias.add_(1.0)  # the graph reads it under its own name
    assert torch.allclose(other(x), expected + 1.0, atol=1e-6)
    assert torch.equal(quant_model(x), expected)


def test_float_weights_do_not_stay_alive() -> None:
    model, x = seeded(Speaker).eval(), normal(8, 16)
    quantizer = calibrated(model, [((x,), {})], backend="reference")
    quant_model = quantizer.quantize(model)
    weights = [weakref.ref(each) for each in model.parameters() if each.dim() > 1]
    del model, quantizer
    gc.collect()
    assert not any(each() is not None for each in weights)
    assert quant_model(x).shape == (8, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_of_several_kinds_of_calls_share_their_weights(backend: str) -> None:
    model = seeded(Speaker).eval()
    quantizer = calibrated(model, [((normal(8, 16),), {})], backend=backend)
    once = quantizer.quantize(model).state_dict()
    quantizer.calib(model)(normal(2, 3, 16))
    twice: Any = quantizer.quantize(model)
    assert len(twice.graphs) == 2
    assert twice.state_dict().keys() == once.keys()


class Wrapper(nn.Module):
    """Has what its inner module has, as wrappers of the field do it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Speaker()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


class Registered(nn.Module):
    """Its class wants an argument of every subclass, and its instances are made in its own way."""

    known: dict[str, type] = {}  # noqa: RUF012 - a registry

    def __init_subclass__(cls, *, key: str) -> None:
        cls.known[key] = cls

    def __new__(cls, width: int) -> Registered:
        return super().__new__(cls)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the twin has nn.Module's own")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("build", [Wrapper, lambda: Registered(16)])
def test_unusual_classes(build: Any) -> None:
    model, x = seeded(build).eval(), normal(8, 16)
    quantizer = Quantizer("reference")
    calib_model: Any = quantizer.calib(model)
    assert torch.equal(calib_model(x), model(x))
    quant_model: Any = quantizer.quantize(model)
    for each in (calib_model, quant_model, copy.deepcopy(quant_model)):
        assert isinstance(each, type(model))
    assert sqnr(model(x), quant_model(x)) > 30
    assert quant_model.state_dict()
    if isinstance(model, Wrapper):
        assert quant_model.doubled == calib_model.doubled == 32
        assert sqnr(model.shifted(x), quant_model.shifted(x)) > 30
    else:
        assert Registered.known == {}
