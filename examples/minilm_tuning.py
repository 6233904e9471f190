"""Which layers of all-MiniLM-L6-v2 does int8 hurt, and how few of them in float are enough?

Ranks every layer in one pass over 32 docstrings, then finds the fewest layers in float that give a
wanted mean cosine with the float model's sentence embeddings.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import interleaved_latency, print_table
from minilm_data import embed, load_pairs, model_folder, retrieval
from tqdm import tqdm

from torch_quant import Quantizer, cosine, tune


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--backend", choices=("reference", "onednn"), help="default: the best of this machine"
    )
    parser.add_argument("--cosine", type=float, default=0.995, help="wanted mean (default 0.995)")
    parser.add_argument(
        "--output", type=Path, default=Path("out"), help="folder for plot and table"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args()
    if not 0 < options.cosine <= 1:
        parser.error(f"--cosine {options.cosine}: expected more than 0, at most 1")
    return options


def main() -> None:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    options = parse()
    logging.basicConfig(level=logging.WARNING)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor")
    torch.set_num_threads(options.threads)
    model = AutoModel.from_pretrained(model_folder()).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    data = load_pairs()
    queries = [pair.query for pair in data.held_out]
    bodies = [pair.body for pair in data.held_out]

    quantizer = Quantizer(options.backend)
    calib_model = quantizer.calib(model)
    for body in tqdm(data.calibration, desc="calibrating", unit="text"):
        embed(calib_model, tokenizer, [body])
    int8_model = quantizer.quantize(model)

    # One pass tells what each layer's error does to the output.
    amp_model = quantizer.amp(model)
    for i in tqdm(range(0, 32, 8), desc="ranking", unit="batch"):
        embed(amp_model, tokenizer, data.calibration[i : i + 8])
    report = quantizer.sensitivity(amp_model, measure=True)
    report.rows = 12
    print(f"\n{report}\n")
    options.output.mkdir(parents=True, exist_ok=True)
    report.plot(options.output / "minilm_sensitivity.png")
    report.to_csv(options.output / "minilm_sensitivity.csv")

    # As few layers in float as the user's own metric asks for.
    texts = data.calibration
    expected = embed(model, tokenizer, texts)

    def mean_cosine(candidate: torch.nn.Module) -> float:
        return float(cosine(expected, embed(candidate, tokenizer, texts)).mean())

    tuned = tune(quantizer, model, mean_cosine, 1.0 - options.cosine, amp_batches=4)
    print(f"\n{quantizer.tuning}\n")

    vectors = {
        name: [embed(each, tokenizer, part) for part in (queries, bodies)]
        for name, each in tqdm(
            {"float32": model, "int8": int8_model, "tuned": tuned}.items(), desc="scoring"
        )
    }
    tokens = torch.randint(1000, 20000, (8, 128))
    mask = torch.ones_like(tokens)
    mask[0, 100:] = 0
    latency = interleaved_latency(
        {
            name: lambda each=each: each(input_ids=tokens, attention_mask=mask)
            for name, each in (("float32", model), ("int8", int8_model), ("tuned", tuned))
        }
    )
    angles = {
        name: cosine(torch.cat(vectors["float32"]), torch.cat(vectors[name]))
        for name in ("int8", "tuned")
    }
    rows = [
        (
            f"retrieval MRR, {len(queries)} pairs",
            *(f"{retrieval(*v)[0]:.4f}" for v in vectors.values()),
        ),
        ("cosine with float, mean", "1", *(f"{angle.mean():.4f}" for angle in angles.values())),
        ("cosine with float, worst", "1", *(f"{angle.min():.4f}" for angle in angles.values())),
        ("latency, eager, 8 x 128", *(f"{time:.1f} ms" for time in latency.values())),
    ]
    print()
    print_table(rows, "float32", "int8", "tuned")
    print(f"\n{options.output}: minilm_sensitivity.png and .csv")


if __name__ == "__main__":
    main()
