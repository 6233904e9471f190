"""Decoders that generate: a prefill of tokens, then one token a call with a key-value cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flows import BACKENDS
from models import normal, tokens
from torch import Tensor, nn
from zoo import EVERYTHING
from zoo_base import entry, text, text_to_text
from zoo_text import SMALL

from torch_quant import Quantizer, sqnr

VOCABULARY = 128
OLD_NAME = "past_key_values"
"""What transformers called a cache before 5.24."""


def _causal(name: str, **config: Any) -> Callable[[], nn.Module]:
    options = {**SMALL, "use_cache": True, **config}
    return entry(name, name, options, text, text, "text").build


def _seq2seq(name: str, **config: Any) -> Callable[[], nn.Module]:
    options = {"vocab_size": VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 2, **config}
    inputs = text_to_text if name.startswith("T5") else _spoken
    return entry(name, name, options, inputs, inputs, "text").build


def _spoken(batch: int) -> dict[str, Tensor]:
    return {
        "input_features": normal(batch, 8, 32),
        "decoder_input_ids": tokens(batch, 5, VOCABULARY),
    }


HEADS = {"num_key_value_heads": 2}
DECODERS = {
    "llama": _causal("LlamaForCausalLM", **HEADS),
    "gpt2": _causal("GPT2LMHeadModel"),
    "qwen2": _causal("Qwen2ForCausalLM", **HEADS),
    "gemma": _causal("GemmaForCausalLM", num_key_value_heads=1, head_dim=8),
    "mistral": _causal("MistralForCausalLM", sliding_window=6, **HEADS),
    "gemma3": _causal(
        "Gemma3ForCausalLM", num_key_value_heads=1, head_dim=8, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "opt": _causal("OPTForCausalLM", ffn_dim=64, word_embed_proj_dim=32),
    "t5": _seq2seq(
        "T5ForConditionalGeneration", d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4,
    ),
    "whisper": _seq2seq(
        "WhisperForConditionalGeneration", d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=16, max_target_positions=32,
        bos_token_id=1, eos_token_id=2, suppress_tokens=None, begin_suppress_tokens=None,
    ),
}  # fmt: skip


KINDS = {"llama", "gpt2", "gemma3", "opt", "t5", "whisper"}
"""For every run. The others differ in biases and norms, or slide a window as gemma3 does."""


def first_inputs(name: str, batch: int) -> dict[str, Tensor]:
    """What the encoder reads; empty for a decoder alone."""
    if name == "t5":
        return {"input_ids": tokens(batch, 7, VOCABULARY)}
    if name == "whisper":
        return {"input_features": normal(batch, 8, 32)}
    return {}


def steps(
    name: str,
    model: Any,
    proxy: Any,
    prompt: Tensor,
    count: int,
    forced: list[Tensor] | None = None,
) -> list[Tensor]:
    """Greedy decoding: the logits of the last position at each of ``count`` calls.

    Args:
        name: of the architecture.
        model: the float model, which runs the encoder.
        proxy: what decodes.
        prompt: token ids (batch, length).
        count: calls, the one with the prompt included.
        forced: logits to take the tokens of, instead of its own.
    """
    given: dict[str, Any] = {}
    if encoded := first_inputs(name, len(prompt)):
        given["encoder_outputs"] = model.get_encoder()(**encoded)
    key = "decoder_input_ids" if encoded else "input_ids"
    cached = "cache" if "cache" in inspect.signature(model.forward).parameters else OLD_NAME
    ids, cache, found = prompt, None, []
    for i in range(count):
        outputs = proxy(**given, **{key: ids, cached: cache}, use_cache=True)
        cache = outputs[cached]
        found.append(outputs.logits[:, -1])
        ids = (found if forced is None else forced)[i].argmax(-1, keepdim=True)
    return found


@pytest.mark.parametrize("name", [name for name in DECODERS if EVERYTHING or name in KINDS])
@torch.no_grad()
def test_a_decoder_calibrates_and_decodes_with_its_cache(name: str) -> None:
    model = DECODERS[name]()
    prompt = tokens(2, 5, VOCABULARY)
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    if not first_inputs(name, 1):  # with tensors alone first, as most calibrate
        ids = tokens(2, 9, VOCABULARY)
        assert torch.equal(calib_model(input_ids=ids).logits, model(input_ids=ids).logits)
    steps(name, model, calib_model, prompt, 4)
    expected = steps(name, model, model, prompt, 10)
    for mine, theirs in zip(steps(name, model, calib_model, prompt, 10), expected, strict=True):
        assert torch.equal(mine, theirs)
    for backend in sorted({"reference", "onednn"} & set(BACKENDS)):
        quant_model = quantizer.quantize(model, backend=backend)
        decoder = model.get_decoder()
        linears = sum(isinstance(m, nn.Linear) for m in decoder.modules())
        sites = [quantizer.plan[site].op for site in quantizer.plan.quantized]
        assert sites.count("linear") >= linears
        # Along the float model's tokens, so that one close call does not change all that follows.
        decoded = steps(name, model, quant_model, prompt, 10, expected)
        assert sqnr(torch.stack(expected), torch.stack(decoded)) > 15
