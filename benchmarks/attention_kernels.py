"""Scaled dot-product attention in int8: this package's kernels beside PyTorch's in float.

One thread, all timed in turns in one run; microseconds are medians of the thread's own time, so
that other work on the machine costs little. Codes go in and out, as between quantized layers,
unless a column says otherwise; what it takes to round the float result for the next layer is not
counted. Asserts nothing.

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/attention_kernels.py
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from harness import report
from torch import Tensor
from torch.nn import functional as F

from torch_quant import native, sqnr
from torch_quant.native.products import ATTENTION
from torch_quant.ops.attention import sdpa_probabilities

SHAPES = {
    "MiniLM, 8 x 128": (8, 12, 12, 128, 128, 32),
    "BERT-base, 1 x 384": (1, 12, 12, 384, 384, 64),
    "ViT-B/16": (1, 12, 12, 197, 197, 64),
    "ViT-tiny": (1, 3, 3, 197, 197, 64),
    "1024 tokens": (1, 8, 8, 1024, 1024, 64),
    "decoding, 512 keys, 9 heads on 3": (1, 9, 3, 1, 512, 64),
    "a sentence, 1 x 16": (1, 12, 12, 16, 16, 32),
}
"""Batch, heads, heads of keys, queries, keys, size of a head."""

Run = Callable[[], Tensor]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each shape (default 4)")
    return parser.parse_args()


def codes(batch: int, tokens: int, heads: int, size: int) -> Tensor:
    """A projection of N(0, 1) values, cut into heads."""
    x = torch.randn(batch, tokens, heads * size) / 0.02 + 128
    return x.round().clamp(0, 255).to(torch.uint8).view(batch, tokens, heads, size).transpose(1, 2)


def attention(
    tensors: list[Tensor], largest: float, mask: Tensor | None = None, causal: bool = False,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:  # fmt: skip
    """``largest`` is the largest probability."""
    scale = 1 / math.sqrt(tensors[0].shape[-1])
    grids = ([0.02, 0.02, 0.02, largest / 255], [128, 128, 128, 0], 255)
    ending = (1.0, 0, dtype) if dtype is torch.float32 else (0.005, 128, dtype)
    return ATTENTION(*tensors, mask, causal, scale, *grids, *ending, True)  # type: ignore[no-any-return]


def on(instructions: str, run: Run) -> Run:
    def with_these() -> Tensor:
        with native.using(instructions):
            return run()

    return with_these


def cases(shape: tuple[int, ...]) -> dict[str, Run]:
    batch, heads, shared, queries, keys, size = shape
    sizes = ((queries, heads), (keys, shared), (keys, shared))
    int8 = [codes(batch, tokens, count, size) for tokens, count in sizes]
    floats = [(x.float() - 128) * 0.02 for x in int8]
    halves = [x.bfloat16() for x in floats]
    seen = (torch.arange(keys) < keys - keys // 5).expand(batch, 1, queries, keys)
    gqa = {"enable_gqa": heads != shared}
    largest = float(sdpa_probabilities(*floats, enable_gqa=heads != shared).max())
    found: dict[str, Run] = {
        "float32": lambda: F.scaled_dot_product_attention(*floats, **gqa),
        "bfloat16": lambda: F.scaled_dot_product_attention(*halves, **gqa),
        "int8": lambda: attention(int8, largest),
        "int8, bool mask": lambda: attention(int8, largest, seen),
        "int8 from float32": lambda: attention(floats, largest, dtype=torch.float32),
    }
    if queries == keys:
        found["float32, causal"] = lambda: F.scaled_dot_product_attention(*floats, is_causal=True)
        found["int8, causal"] = lambda: attention(int8, 1.0, causal=True)
    for name in native.instruction_sets()[:-1]:
        found[f"int8 on {name}"] = on(name, found["int8"])
    return found


def timed(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["int8"]) < 7:
        for name, run in runs.items():
            start = time.thread_time()
            run()
            times[name].append(time.thread_time() - start)
    return {name: statistics.median(each) * 1e6 for name, each in times.items()}


def main() -> None:
    seconds = parse().seconds
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        for name, shape in SHAPES.items():
            runs = cases(shape)
            found = timed(runs, seconds)
            exact, rounded = runs["float32"](), runs["int8 from float32"]()
            rows.append(
                {"shape": name}
                | {key: round(us, 1) for key, us in found.items()}
                | {
                    "float32 / int8": round(found["float32"] / found["int8"], 2),
                    "SQNR, dB": round(float(sqnr(exact, rounded)), 1),
                }
            )
    report("attention_kernels", rows, unit="microseconds", kernels=native.instruction_sets()[-1])


if __name__ == "__main__":
    main()
