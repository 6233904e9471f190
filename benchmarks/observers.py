"""What each observer does to the accuracy of static int8: MiniLM, and networks trained on digits.

The default observer of each op type (``torch_quant/statistics/defaults.py``) is chosen from it.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from harness import minilm, report  # makes the examples importable

# isort: split
from digits_cnn_ptq import ResidualCNN, accuracy
from digits_data import load_digits_split, train
from digits_networks import DepthwiseCNN, SmallViT
from minilm_data import embed, load_pairs, model_folder, retrieval

from torch_quant import QConfig, Quantizer, cosine, sqnr
from torch_quant.statistics import OBSERVERS


def digits_rows(observers: list[str]) -> list[dict[str, Any]]:
    training, held_out = load_digits_split()
    rows = []
    for build in (ResidualCNN, DepthwiseCNN, SmallViT):
        torch.manual_seed(0)
        model = train(build(), training, epochs=15)
        expected = model(held_out.images).detach()
        for observer in observers:
            quantizer = Quantizer("reference", qconfig=QConfig(observer=observer))
            calib_model = quantizer.calib(model)
            for images in training.images[:256].split(32):
                calib_model(images)
            quant_model = quantizer.quantize(model)
            rows.append(
                {
                    "model": f"digits {build.__name__}",
                    "observer": observer,
                    "SQNR dB": sqnr(expected, quant_model(held_out.images)),
                    "task": f"{accuracy(quant_model, held_out):.2%}",
                    "task, float": f"{accuracy(model, held_out):.2%}",
                }
            )
    return rows


def minilm_rows(observers: list[str]) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    model, tokenizer, data = minilm(), AutoTokenizer.from_pretrained(model_folder()), load_pairs()
    texts = [[pair.query for pair in data.held_out], [pair.body for pair in data.held_out]]
    expected = [embed(model, tokenizer, each) for each in texts]
    rows = []
    for observer in observers:
        quantizer = Quantizer(qconfig=QConfig(observer=observer))
        calib_model = quantizer.calib(model)
        for body in data.calibration:
            embed(calib_model, tokenizer, [body])
        for backend in ("reference", quantizer.backend.name):
            quant_model = quantizer.quantize(model, backend=backend)
            actual = [embed(quant_model, tokenizer, each) for each in texts]
            angle = cosine(torch.cat(expected), torch.cat(actual))
            rows.append(
                {
                    "model": f"MiniLM, {backend}",
                    "observer": observer,
                    "cosine": float(angle.mean()),
                    "task": f"{retrieval(*actual)[0]:.4f}",
                    "task, float": f"{retrieval(*expected)[0]:.4f}",
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--observers", nargs="+", default=sorted(OBSERVERS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor")
    torch.set_num_threads(1)
    with torch.enable_grad():
        rows = digits_rows(options.observers)
    report("observers", rows + minilm_rows(options.observers))


if __name__ == "__main__":
    main()
