"""Train the pretrained all-MiniLM-L6-v2 through its quantization, with its float self as teacher.

All products are rounded, those of attention too. Activations have a scale for each vector that is
summed over, chosen at each call; weights one for each group or output channel, and begin as GPTQ
rounds them. No labels are needed: the texts are docstrings of Python's standard library. The table
compares the embeddings of other docstrings with those of the float model, "calibrated" in the same
formats as "trained".
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
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import print_table
from minilm_data import load_pairs, model_folder, retrieval
from torch import Tensor, nn
from tqdm import tqdm

from torch_quant import (
    Distillation,
    PerChannel,
    PerGroup,
    QConfig,
    Quantizer,
    QuantSpec,
    SmoothQuant,
    recipes,
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a local folder with weights and a tokenizer")
    parser.add_argument("--weight-bits", type=int, default=4, help="default 4; activations have 8")
    parser.add_argument(
        "--group", type=int, help="inputs that share a scale; 0 for all (default 32; 0 for 8 bits)"
    )
    parser.add_argument("--texts", type=int, default=160, help="to calibrate (default 160)")
    parser.add_argument("--steps", type=int, default=200, help="default 200")
    parser.add_argument("--batch", type=int, default=8, help="texts in a batch (default 8)")
    parser.add_argument("--length", type=int, default=48, help="tokens of a text (default 48)")
    parser.add_argument("--lr", type=float, help="of weights (default 5e-5; 2e-6 for 8 bits)")
    parser.add_argument(
        "--bias-lr", type=float, help="of biases and norms (default 2e-4; 4e-5 for 8 bits)"
    )
    parser.add_argument(
        "--scale-lr", type=float, help="of scales, in units of each (default 1e-3; 5e-5 for 8 bits)"
    )
    parser.add_argument("--pairs", type=int, default=200, help="held-out pairs (default 200)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser.parse_args()


class Embedder(nn.Module):
    """Sentence embeddings, of length 1, by the mean over a text; ``[texts, features]``."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        outputs = self.bert(input_ids=input_ids, attention_mask=attention_mask)
        hidden = outputs["last_hidden_state"]
        mask = attention_mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def embed(model: nn.Module, tokenizer: object, texts: list[str], batch: int = 16) -> Tensor:
    """Embeddings of texts of any length, ``[texts, features]``."""
    parts = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(  # type: ignore[operator]
            texts[start : start + batch],
            padding=True,
            truncation=True,
            max_length=128,
            return_tensors="pt",
        )
        parts.append(model(inputs["input_ids"], inputs["attention_mask"]))
    return torch.cat(parts)


def formats(bits: int, group: int) -> QConfig:
    """Weights of so many bits under activations of 8."""
    granularity = PerGroup(group) if group else PerChannel()
    weight = QuantSpec.of(bits=bits, signed=not group, symmetric=not group, granularity=granularity)
    # In groups, weights have little room for what SmoothQuant moves into them.
    transforms = [] if group else [SmoothQuant(0.8, min_gain=1.25)]
    return replace(recipes.int8_dynamic(method="gptq"), weight=weight, transforms=transforms)


def groups_of(
    quantizer: Quantizer, qat_model: nn.Module, lr: float, bias_lr: float, scale_lr: float
) -> list[dict[str, Any]]:
    """For an optimizer: matrices, then biases and norms, then scales."""
    ours, *scales = quantizer.parameter_groups(qat_model, lr=lr, scale_lr=scale_lr, relative=True)
    matrices = [each for each in ours["params"] if each.dim() > 1]
    vectors = [each for each in ours["params"] if each.dim() <= 1]
    return [{**ours, "params": matrices}, {**ours, "params": vectors, "lr": bias_lr}, *scales]


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
    model = Embedder(AutoModel.from_pretrained(folder, add_pooling_layer=False)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = load_pairs(calibration=1200, held_out=options.pairs)
    floating = copy.deepcopy(model)  # training changes the weights

    few = options.weight_bits < 8
    group = options.group if options.group is not None else 32 if few else 0
    quantizer = Quantizer(
        "reference",
        qconfig=formats(options.weight_bits, group),
        overrides={torch.nn.Embedding: formats(8, 0)},
        capture="whole",
    )
    calib_model = quantizer.calib(model)
    for body in tqdm(data.calibration[: options.texts], desc="calibrating", unit="text"):
        embed(calib_model, tokenizer, [body])

    qat_model = quantizer.qat(model)  # gives the first and the last layer 8 bits
    calibrated = quantizer.quantize(model)
    layers = [f"bert.encoder.layer.{i}" for i in range(len(model.bert.encoder.layer))]
    distillation = Distillation(qat_model, hidden=layers, hidden_weight=0.25)
    # From where GPTQ begins, 8 bits have little to gain: biases and norms learn more than weights.
    rates_ = (5e-5, 2e-4, 1e-3) if few else (2e-6, 4e-5, 5e-5)
    asked = options.lr, options.bias_lr, options.scale_lr
    chosen = [each if each is not None else x for each, x in zip(asked, rates_, strict=True)]
    groups = groups_of(quantizer, qat_model, *chosen)
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
