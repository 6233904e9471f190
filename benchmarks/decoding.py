"""Time of one decoded token with a key-value cache, float against int8, batch 1.

SmolLM2-135M's architecture with random weights, on which latency does not depend. In pieces: the
cache is an object that only the model's Python knows. Whole: the cache is registered as a pytree,
so the decoder is one graph that takes and gives its tensors.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import time
import warnings
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from harness import report
from torch import nn

from torch_quant import Quantizer, recipes


def smollm(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    ).eval()


class Decoding:
    """One model and its cache: every call of it decodes one more token.

    Args:
        model: the float model, or one made from it.
        cached: the name of the argument that takes the cache.
        prompt: token ids, (1, length).
    """

    def __init__(self, model: Any, cached: str, prompt: torch.Tensor) -> None:
        self.model, self.cached = model, cached
        self.cache: Any = None
        self.ids = prompt
        self()

    def __call__(self) -> float:
        """Milliseconds of this thread for the call; each sees a cache length that is new."""
        start = time.thread_time()
        outputs = self.model(input_ids=self.ids, use_cache=True, **{self.cached: self.cache})
        took = 1e3 * (time.thread_time() - start)
        self.cache = outputs[self.cached]
        self.ids = outputs["logits"][:, -1:].argmax(-1)
        return took


class FixedCache(Decoding):
    """With a cache that has room for ``length`` tokens from the start, as compiled steps want."""

    def __init__(
        self, model: Any, cached: str, prompt: torch.Tensor, length: int, config: Any = None
    ) -> None:
        from transformers import StaticCache

        self.fixed = StaticCache(config or model.config, max_cache_len=length)
        self.at = 0
        super().__init__(model, cached, prompt)

    def __call__(self) -> float:
        """As :class:`Decoding` does; at the first two calls, a compiled model is compiled."""
        places = torch.arange(self.at, self.at + self.ids.shape[1])
        start = time.thread_time()
        given = {"position_ids": places[None], self.cached: self.fixed}
        logits = self.model(input_ids=self.ids, **given).logits
        took = 1e3 * (time.thread_time() - start)
        self.at, self.ids = self.at + len(places), logits[:, -1:].argmax(-1)
        return took


def cache_name(model: nn.Module) -> str:
    """Of the argument and of the output; it changed in transformers 5.24."""
    takes = inspect.signature(model.forward).parameters
    return "cache" if "cache" in takes else "past_key_values"


def measure(models: dict[str, Any], cached: str, tokens: int) -> dict[str, float]:
    """Median milliseconds a token of each model, taken in turns."""
    prompt = torch.arange(1, 33).reshape(1, -1)
    return in_turns({n: Decoding(model, cached, prompt) for n, model in models.items()}, tokens)


def in_turns(running: Mapping[str, Decoding], tokens: int) -> dict[str, float]:
    """Median milliseconds a token of each, the first two left out."""
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(tokens):
        for name, decode in running.items():
            times[name].append(decode())
    return {name: median(found[2:]) for name, found in times.items()}


def compiled(model: nn.Module, cached: str, backend: str | None, tokens: int) -> dict[str, float]:
    """Milliseconds a token of float and int4 weights, eager and compiled; bfloat16 beside them."""
    prompt = torch.arange(1, 33).reshape(1, -1)
    from torch_quant.integrations.generation import compiled_steps

    recipe = recipes.int4_weight_only(group_size=64)
    quantizer = Quantizer(backend, qconfig=recipe, capture="modules")
    int4 = quantizer.quantize(model, example_inputs={"input_ids": prompt})
    bfloat16 = copy.deepcopy(model).to(torch.bfloat16)
    running: dict[str, Decoding] = {"bfloat16": Decoding(bfloat16, cached, prompt)}
    for name, each in (("float32", model), ("int4", int4)):
        running[name] = Decoding(each, cached, prompt)
        running[f"{name}, fixed cache"] = FixedCache(each, cached, prompt, tokens + 34)
        step = compiled_steps(each) and each.get_compiled_call()
        running[f"{name}, compiled"] = FixedCache(step, cached, prompt, tokens + 34, each.config)
    return in_turns(running, tokens)


def quantized(model: nn.Module, cached: str, backend: str | None) -> Any:
    quantizer = Quantizer(backend)
    decode = Decoding(quantizer.calib(model), cached, torch.arange(1, 17).reshape(1, -1))
    for _ in range(2):
        decode()
    return quantizer.quantize(model)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", help="default: the best of this machine")
    parser.add_argument("--layers", type=int, default=30, help="of the decoder")
    parser.add_argument("--tokens", type=int, default=40, help="decoded with each model")
    parser.add_argument("--compiled", action="store_true", help="int4 weights, eager and compiled")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor")
    torch.set_num_threads(1)
    model = smollm(options.layers)
    cached = cache_name(model)
    if options.compiled:
        times = compiled(model, cached, options.backend, options.tokens)
    else:
        models = {"float32": model, "int8, in pieces": quantized(model, cached, options.backend)}
        register_cache(model)
        models["int8, whole"] = quantized(model, cached, options.backend)
        times = measure(models, cached, options.tokens)
    rows = [
        {"model": name, "ms a token": time, "speed-up": times["float32"] / time}
        for name, time in times.items()
    ]
    name = "decoding_compiled" if options.compiled else "decoding"
    report(name, rows, layers=options.layers)


def register_cache(model: nn.Module) -> None:
    """Let pytree know the model's caches, which makes graphs take and give their tensors."""
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

    register_cache_pytrees_for_model(model)


if __name__ == "__main__":
    main()
