"""A decoder of 1.2 billion parameters goes through 4 bits: CPU seconds and memory.

The sizes are those of Llama 3.2 1B, the weights random, on which neither depends. To nearest, and
by GPTQ on one text, the whole model is quantized. What more texts cost is measured on one block and
counted for each; with --whole, the whole model takes all of them.

Memory is what a process grows at most, the float model included, beside the bytes of that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
from harness import keep, kept_rows, peak_memory, report
from llm import OUTER
from torch import nn

from torch_quant import GPTQ, Quantizer, recipes

SIZES: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
BLOCKS = 16
LENGTH = 512
"""Tokens of a text."""


def decoder(blocks: int) -> nn.Module:
    """Random weights, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=blocks, **SIZES)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def one(method: str, blocks: int, tokens: int) -> dict[str, float]:
    """CPU seconds and MB of one model, in this process."""
    with peak_memory() as peak:
        model = decoder(blocks)
        made, start = peak(), time.process_time()
        quantizer = Quantizer(
            recipes.int4_weight_only(
                group_size=128, method=GPTQ(full_range=True) if method == "gptq" else None
            ),
            overrides=dict.fromkeys(OUTER, recipes.int8_weight_only()),
            capture="modules",
        )
        ids = torch.randint(SIZES["vocab_size"], (max(tokens // LENGTH, 1), 1, LENGTH))
        if method == "gptq":
            quantizer.round_weights(model, list(ids))
        rounded = peak()
        quantizer.quantize(model, example_inputs={"input_ids": ids[0, :, :16]})
        size = sum(x.numel() * x.element_size() for x in model.parameters()) / 2**20
        return {
            "s": time.process_time() - start,
            "made MB": made,
            "rounded MB": rounded,
            "MB": peak(),
            "float MB": size,
            "times float": peak() / size,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192, help="to calibrate on (default 8192)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--whole", action="store_true", help="all tokens through the whole model")
    parser.add_argument("--again", action="store_true", help="measure rows that are known too")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        method, *numbers = options.one
        print(json.dumps(one(method, *map(int, numbers))))
        return
    settings = {"tokens": options.tokens, "threads": options.threads}
    rows = {} if options.again else {r["row"]: r for r in kept_rows("llm_large", settings)}

    def measured(method: str, blocks: int, tokens: int) -> dict[str, Any]:
        """A row, made by a process of its own unless it is known."""
        name = f"{method}, {blocks} blocks" + (f", {tokens} tokens" if method == "gptq" else "")
        if name not in rows:
            command = [sys.executable, __file__, "--threads", str(options.threads), "--one"]
            command += [method, str(blocks), str(tokens)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows[name] = {"row": name, **json.loads(done.stdout.splitlines()[-1])}
            keep("llm_large", list(rows.values()), **settings)
        return rows[name]

    measured("rtn", BLOCKS, LENGTH)
    if options.whole:
        measured("gptq", BLOCKS, options.tokens)
    else:
        whole = measured("gptq", BLOCKS, LENGTH)
        few, many = (measured("gptq", 1, tokens) for tokens in (LENGTH, options.tokens))
        name = f"gptq, {BLOCKS} blocks, {options.tokens} tokens, projected"
        memory = whole["MB"] + many["MB"] - few["MB"]
        rows[name] = {
            "row": name,
            "s": whole["s"] + BLOCKS * (many["s"] - few["s"]),
            "MB": memory,
            "float MB": whole["float MB"],
            "times float": memory / whole["float MB"],
        }
    report("llm_large", list(rows.values()), **settings)


if __name__ == "__main__":
    main()
