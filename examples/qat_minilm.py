"""Train the pretrained all-MiniLM-L6-v2 through its quantization, with its float self as teacher.

No labels are needed: the texts are docstrings of Python's standard library. The table compares the
embeddings of other docstrings with those of the float model, before and after training.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import print_table
from minilm_data import embed, load_pairs, model_folder, retrieval
from torch import Tensor
from tqdm import tqdm

from torch_quant import Distillation, Quantizer, QuantSpec, RoundToNearest, recipes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a local folder with weights and a tokenizer")
    parser.add_argument("--weight-bits", type=int, default=4, help="default 4; activations have 8")
    parser.add_argument("--steps", type=int, default=200, help="default 200")
    parser.add_argument("--batch", type=int, default=8, help="texts in a batch (default 8)")
    parser.add_argument("--length", type=int, default=48, help="tokens of a text (default 48)")
    parser.add_argument("--lr", type=float, help="of weights (default 3e-4; 1e-5 for 8 bits)")
    parser.add_argument(
        "--scale-lr", type=float, default=0.01, help="of scales, in units of each (default 0.01)"
    )
    parser.add_argument("--pairs", type=int, default=200, help="held-out pairs (default 200)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser.parse_args()


def batches_of(texts: list[str], tokenizer: object, batch: int, length: int) -> list[Tensor]:
    """Ids of texts that are long enough, cut to one length: no padding is learned from."""
    rows = [
        row[:length]
        for row in tokenizer(texts, truncation=True, max_length=length)["input_ids"]  # type: ignore[operator]
        if len(row) >= length
    ]
    return [torch.tensor(rows[i : i + batch]) for i in range(0, len(rows) - batch + 1, batch)]


def main() -> None:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    options = parse()
    logging.getLogger("torch_quant").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    folder = options.model or model_folder()
    if not (folder / "config.json").is_file():
        raise SystemExit(f"--model {folder}: no config.json there; expected a model folder")
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = load_pairs(calibration=1200, held_out=options.pairs)
    floating = copy.deepcopy(model)  # training changes the weights

    weight = QuantSpec.of(bits=options.weight_bits, signed=True, symmetric=True, per_channel=True)
    few = options.weight_bits < 8
    # Few bits for a weight's whole range waste some of them: scales begin where the error is least.
    method = RoundToNearest(clip_search=True) if few else None
    qconfig = replace(recipes.int8_static(), weight=weight, method=method)
    quantizer = Quantizer("reference", qconfig=qconfig)
    calib_model = quantizer.calib(model)
    for body in tqdm(data.calibration[:64], desc="calibrating", unit="text"):
        embed(calib_model, tokenizer, [body])
    calibrated = quantizer.quantize(model)

    qat_model = quantizer.qat(model)
    layers = [f"encoder.layer.{i}" for i in range(model.config.num_hidden_layers)]
    distillation = Distillation(qat_model, hidden=layers)
    lr = options.lr or (3e-4 if few else 1e-5)
    groups = quantizer.parameter_groups(qat_model, lr=lr, scale_lr=options.scale_lr, relative=True)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=options.steps, pct_start=0.1
    )
    batches = batches_of(data.calibration, tokenizer, options.batch, options.length)
    start = time.perf_counter()
    bar = tqdm(range(options.steps), desc="training through the plan", unit="step")
    for step in bar:
        ids = batches[step % len(batches)]
        loss = distillation.loss(input_ids=ids, attention_mask=torch.ones_like(ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        bar.set_postfix(outputs=f"{distillation.distances['outputs']:.4f}")
    seconds = time.perf_counter() - start
    trained = quantizer.quantize(qat_model.eval())

    queries = [pair.query for pair in data.held_out]
    bodies = [pair.body for pair in data.held_out]
    figures: dict[str, tuple[float, float]] = {}
    expected = None
    for name, each in (("float32", floating), ("calibrated", calibrated), ("trained", trained)):
        vectors = embed(each, tokenizer, queries), embed(each, tokenizer, bodies)
        expected = expected or vectors
        near = [float((a * b).sum(1).mean()) for a, b in zip(vectors, expected, strict=True)]
        figures[name] = sum(near) / 2, retrieval(*vectors)[0]
    print()
    print_table(
        [
            ("cosine with float", *(f"{cosine:.5f}" for cosine, _ in figures.values())),
            ("mean reciprocal rank", *(f"{rank:.4f}" for _, rank in figures.values())),
            ("seconds of training", "", "", f"{seconds:.0f}"),
        ],
        "float32",
        f"W{options.weight_bits}A8, calibrated",
        f"W{options.weight_bits}A8, trained",
    )
    if options.json is not None:
        data_ = {"seconds": seconds, "options": {k: str(v) for k, v in vars(options).items()}}
        options.json.write_text(json.dumps(figures | data_, indent=2) + "\n")


if __name__ == "__main__":
    main()
