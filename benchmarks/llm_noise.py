"""Whether one weight method is better than another on the small decoder, or just luckier.

Each row has the mean of the log perplexity's difference to float and to the first method, over
blocks of held-out text, with the standard errors of these means: differences are taken block by
block, so that what makes a block hard for every model does not count. All methods calibrate on the
same texts.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from harness import report
from llm import FORMATS, needs_data, quantizer_of
from small_decoder import small_decoder
from torch import Tensor, nn
from tqdm import tqdm

BLOCK = 256


@torch.no_grad()
def block_losses(model: nn.Module, blocks: Tensor) -> Tensor:
    """The mean loss in each block, nats, ``[blocks]``."""
    found = []
    for block in blocks:
        logits = model(input_ids=block[None], use_cache=False).logits[0, :-1].float()
        found.append(F.cross_entropy(logits, block[1:]))
    return torch.stack(found)


def difference(losses: Tensor, base: Tensor) -> tuple[float, float]:
    """Mean and standard error over blocks, in percent of the perplexity."""
    found = losses - base
    return 100 * float(found.mean()), 100 * float(found.std()) / len(found) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", default="int4 g64", choices=tuple(FORMATS))
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD",
        default=["rtn(full_range=True)", "awq+rtn(full_range=True)", "gptq(full_range=True)"],
        help="as benchmarks/llm.py takes them; others are compared with the first",
    )  # fmt: skip
    parser.add_argument("--blocks", type=int, default=160, help="of 256 tokens (default 160)")
    parser.add_argument("--calibration", type=int, default=8192, help="tokens (default 8192)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, _, text = small_decoder(blocks=options.blocks)
    calibration = [block[None] for block in text.calibration[: options.calibration // BLOCK]]
    exact = block_losses(model, text.evaluation)
    first, rows = None, []
    for method in tqdm(options.methods, unit="method"):
        quantizer = quantizer_of(options.format, method, None, "int8")
        if needs_data(method):
            quantizer.round_weights(model, calibration)
        made = quantizer.quantize(model, example_inputs={"input_ids": text.evaluation[:1, :16]})
        losses = block_losses(made, text.evaluation)
        first = losses if first is None else first
        row: dict[str, Any] = {"format": options.format, "method": method}
        for name, base in (("float", exact), ("the first", first)):
            mean, error = difference(losses, base)
            row |= {f"beside {name}, %": mean, f"error of {name}, %": error}
        rows.append(row)
    report("llm_noise", rows, tokens=text.evaluation.numel(), calibration=options.calibration)


if __name__ == "__main__":
    main()
