"""Round the weights of a pretrained language model to int8 and int4, and compare it with float32.

SmolLM2-135M-Instruct: perplexity on docstrings and descriptions of packages, size, tokens a second
and what it answers. Activations stay in float, so that no data is needed but where the weight
method wants some.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import print_table
from llm_data import CACHE, PROMPT, load_text, perplexity, sample, smollm2
from torch import Tensor

import torch_quant
from torch_quant import Quantizer, recipes

OUTER = ("model.embed_tokens", "lm_head")
"""Embedding and head, which are tied. They keep 8 bits, as 4 cost the most there."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", help="default: the best of this machine")
    parser.add_argument(
        "--group-size", type=int, default=64, help="weights that share a scale in int4 (default 64)"
    )
    parser.add_argument(
        "--method", default="gptq", help="how int4 weights are rounded (default gptq)"
    )
    parser.add_argument(
        "--calibration", type=int, default=16, help="texts of 512 tokens for --method (default 16)"
    )
    parser.add_argument("--tokens", type=int, default=3072, help="of the perplexity (default 3072)")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--output", type=Path, default=CACHE, help="folder for the saved models")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--verbose", action="store_true", help="show the log of torch_quant")
    return parser.parse_args()


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def seconds_a_token(model: Any, prompt: Tensor, tokens: int) -> float:
    """Median time of a decoded token, with a cache, behind a prompt of ``[1, length]``."""
    takes = inspect.signature(model.forward).parameters
    cached = "cache" if "cache" in takes else "past_key_values"  # before transformers 5.24
    outputs = model(input_ids=prompt, use_cache=True)
    times = []
    for _ in range(tokens):
        ids = outputs["logits"][:, -1:].argmax(-1)
        start = time.perf_counter()
        outputs = model(input_ids=ids, use_cache=True, **{cached: outputs[cached]})
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


@torch.no_grad()
def main() -> None:
    from transformers.utils import logging as transformers_logging

    options = parse()
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor")
    torch.set_num_threads(options.threads)
    model, tokenizer = smollm2()
    text = load_text(tokenizer, evaluation=options.tokens)
    example = {"input_ids": text.evaluation[:1, :16]}

    int4 = recipes.int4_weight_only(group_size=options.group_size, method=options.method)
    overrides = dict.fromkeys(OUTER, recipes.int8_weight_only())
    models: dict[str, Any] = {"float32": model}
    sizes = {"float32": sum(each.nbytes for each in model.parameters())}
    runs_on = {"float32": "PyTorch"}
    for name, qconfig in (("int8", recipes.int8_weight_only()), ("int4", int4)):
        quantizer = Quantizer(options.backend, qconfig=qconfig, overrides=overrides)
        if options.method != "rtn" and name == "int4":
            batches = [block[None] for block in text.calibration[: options.calibration]]
            quantizer.round_weights(model, batches)
        quant_model = quantizer.quantize(model, example_inputs=example)
        folder = options.output / f"smollm2-135m-instruct-{name}"
        torch_quant.save(quant_model, folder)
        with torch.device("meta"):
            empty = type(model)(model.config)
        loaded = torch_quant.load(folder, model=empty)
        assert torch.equal(loaded(**example).logits, quant_model(**example).logits)
        models[name], sizes[name] = loaded, folder_size(folder)
        sites = quantizer.coverage(model).plan.values()
        quantized = sum(site.quantized for site in sites)
        runs_on[name] = f"{quantizer.backend!r}, {quantized} of {len(sites)} sites"

    found = {
        name: perplexity(each, text.evaluation, title=f"{name}, perplexity")
        for name, each in models.items()
    }
    speed = {
        name: seconds_a_token(each, text.evaluation[:1, :32], 32) for name, each in models.items()
    }
    exact, whole = found["float32"], sizes["float32"]
    rows = [
        ("perplexity", *(f"{each:.2f} ({each / exact:.3f}x)" for each in found.values())),
        ("size", *(f"{each / 1e6:.0f} MB ({each / whole:.1%})" for each in sizes.values())),
        ("tokens a second", *(f"{1 / each:.1f}" for each in speed.values())),
        ("runs on", *runs_on.values()),
    ]
    print(f"\nSmolLM2-135M-Instruct, {text.evaluation.numel()} tokens of {text.sources}, int4: ")
    print(
        f"groups of {options.group_size} by {options.method}; embedding and head in int8; ", end=""
    )
    print(f"{options.threads} thread(s), torch {torch.__version__}\n")
    print_table(rows, *models)
    print(f"\n{options.prompt}")
    for name, each in models.items():
        print(f"\n{name}: {sample(each, tokenizer, options.prompt)}")
    print(f"\n{options.output}: the saved models; loaded from there, the outputs are the same")


if __name__ == "__main__":
    main()
