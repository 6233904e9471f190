"""Decoders that generate: a prefill of tokens, then one token a call with a key-value cache."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flows import BACKENDS
from models import normal, tokens
from thinning import OLDEST, some
from torch import Tensor, nn
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


KINDS = {"llama"} if OLDEST else {"gemma3", "whisper"}
"""For every run, on the oldest torch another one. The rest differs in biases and norms, slides a
window as gemma3 does, or writes texts in ``test_generate``: GPT-2 and T5."""


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


@pytest.mark.parametrize("name", some(DECODERS, *KINDS))
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


REGISTERED = """
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model
from torch_quant import Quantizer

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=4, num_key_value_heads=2)
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()
register_cache_pytrees_for_model(model)
ids = torch.randint(0, 64, (2, 8))

@torch.no_grad()
def decoded(run, steps=5):
    cache, x, tokens = DynamicCache(config=config), ids, []
    for step in range(steps):
        logits = run(input_ids=x, past_key_values=cache, use_cache=True).logits
        assert cache.get_seq_length() == 8 + step, step
        x = logits[:, -1:].argmax(-1)
        tokens.append(x)
    return torch.cat(tokens, 1)

quantizer = Quantizer("reference", capture="whole")
calib_model, expected = quantizer.calib(model), decoded(model)
assert torch.equal(decoded(calib_model), expected)
coverage = quantizer.coverage(model)
assert (coverage.share, coverage.glue) == (1.0, ()), coverage
quant_model = quantizer.quantize(model)
assert decoded(quant_model).shape == expected.shape
assert len(quant_model.graphs) == 2  # of the prompt, and of each token behind it
print("done")
"""


@pytest.mark.long("nine seconds")
@pytest.mark.newest("seven seconds")
@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None
    or importlib.util.find_spec("transformers.exporters") is None,
    reason="transformers has no registration of caches: pip install 'transformers>=5.24'",
)
def test_a_cache_that_is_registered_leaves_a_decoder_whole() -> None:
    """By transformers' own function; in a process of its own, since it holds for all of one."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REGISTERED], capture_output=True, text=True
    )
    assert done.stdout == "done\n", done.stderr[-3000:]
