"""How well one AMP pass ranks layers, against trying every layer, and what each costs.

Exhaustive: quantize only one site, and revert only one site, for every site; each with one
quantized run over the data. The first is compared with the scores, the second with scores and
gains.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from harness import interleaved_latency, minilm, report  # makes the examples importable
from scipy.stats import spearmanr
from torch import nn
from tqdm import tqdm

# isort: split
from digits_data import load_digits_split, train
from digits_networks import DepthwiseCNN, SmallViT
from minilm_data import load_pairs, model_folder

from torch_quant import Quantizer, sqnr

Batch = dict[str, torch.Tensor]


def minilm_case(batches: int) -> tuple[nn.Module, list[Batch], list[Batch]]:
    """Real text, unpadded to calibrate on; batches of 8 x 64 tokens to rank on."""
    from transformers import AutoTokenizer

    tokenizer, data = AutoTokenizer.from_pretrained(model_folder()), load_pairs()
    calibration = [
        dict(tokenizer(body, truncation=True, max_length=128, return_tensors="pt"))
        for body in data.calibration
    ]
    texts = [pair.body for pair in data.held_out[: 8 * batches]]
    options = {"truncation": True, "max_length": 64, "padding": "max_length"}
    ranking = [
        dict(tokenizer(texts[i : i + 8], return_tensors="pt", **options))
        for i in range(0, len(texts), 8)
    ]
    return minilm(), calibration, ranking


def digits_case(
    build: Callable[[], nn.Module], batches: int
) -> tuple[nn.Module, list[Batch], list[Batch]]:
    """A network trained on digits; batches of 128 images."""
    training, held_out = load_digits_split()
    torch.manual_seed(0)
    with torch.enable_grad():
        model = train(build(), training, epochs=15)
    parts = [{"x": images} for images in training.images[:256].split(32)]
    images = torch.cat([held_out.images, training.images])[: 128 * batches]
    return model, parts, [{"x": part} for part in images.split(128)]


class Exhaustive:
    """Quantized runs with chosen sites in float, over the same data."""

    def __init__(self, quantizer: Quantizer, model: nn.Module, batches: list[Batch]) -> None:
        self.quantizer, self.model, self.batches = quantizer, model, batches
        self.state = quantizer.state_dict()
        self.expected = [model(**batch) for batch in batches]

    def sqnr(self, in_float: Iterable[str]) -> float:
        """Output SQNR, dB."""
        fallen = dict.fromkeys(in_float, "float32")
        self.quantizer.load_state_dict(self.state | {"fallback": fallen})
        quant_model = self.quantizer.quantize(self.model)
        return sqnr(self.expected, [quant_model(**batch) for batch in self.batches])


def noise(decibels: float) -> float:
    """Noise power for a signal of power 1."""
    return float(10.0 ** (-decibels / 10.0))


def compare(
    name: str, backend: str, case: tuple[nn.Module, list[Batch], list[Batch]]
) -> list[dict[str, Any]]:
    model, calibration, batches = case
    quantizer = Quantizer(backend)
    calib_model = quantizer.calib(model)
    for batch in calibration:
        calib_model(**batch)

    rankings, seconds, cost = {}, {}, {}
    for metric in ("output", "sqnr"):
        amp_model = quantizer.amp(model, metric=metric)
        amp_model(**batches[0])  # builds the probes
        amp_model = quantizer.amp(model, metric=metric)
        start = time.perf_counter()
        for batch in batches:
            amp_model(**batch)
        rankings[metric] = quantizer.sensitivity(amp_model)
        seconds[metric] = time.perf_counter() - start
        calls = {"float": partial(model, **batches[0]), "amp": partial(amp_model, **batches[0])}
        times = interleaved_latency(calls)
        cost[metric] = times["amp"] / times["float"]

    exhaustive = Exhaustive(quantizer, model, batches)
    sites = rankings["output"].names
    start = time.perf_counter()
    all_int8 = exhaustive.sqnr([])
    only = {}
    reverted = {}
    for site in tqdm(sites, desc=f"{name} on {backend}", unit="site"):
        only[site] = noise(exhaustive.sqnr(set(sites) - {site}))
        reverted[site] = noise(all_int8) - noise(exhaustive.sqnr([site]))
    elapsed = time.perf_counter() - start

    best = {
        way: sorted(sites, key=lambda site, found=found: -found[site])[:5]
        for way, found in (("only", only), ("reverted", reverted))
    }
    at_best = max(exhaustive.sqnr(names) for names in best.values())
    rows = []
    for metric, ranking in rankings.items():
        scores = [ranking.of(site).score for site in sites]
        gains = [ranking.of(site).gain for site in sites]
        truth = [reverted[site] for site in sites]
        top = ranking.names[:5]
        rows.append(
            {
                "model": f"{name}, {backend}",
                "metric": metric,
                "sites": len(sites),
                "Spearman, only this": spearmanr(scores, [only[s] for s in sites]).statistic,
                "all but this": spearmanr(scores, truth).statistic,
                "gain, all but this": spearmanr(gains, truth).statistic,
                "top 5 shared": f"{len(set(top) & set(best['only']))} / "
                f"{len(set(top) & set(best['reverted']))}",
                "SQNR dB": all_int8,
                "predicted": ranking.predicted(),
                "at 5": exhaustive.sqnr(top),
                "exhaustive at 5": at_best,
                "forwards": cost[metric],
                "times cheaper": elapsed / seconds[metric],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=12, help="batches to rank and to try on")
    parser.add_argument("--backends", nargs="+", default=["onednn"])
    parser.add_argument("--models", nargs="+", default=["minilm", "depthwise", "vit"])
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor")
    torch.set_num_threads(1)
    cases = {
        "minilm": ("MiniLM", lambda: minilm_case(options.batches)),
        "depthwise": ("digits DepthwiseCNN", lambda: digits_case(DepthwiseCNN, options.batches)),
        "vit": ("digits SmallViT", lambda: digits_case(SmallViT, options.batches)),
    }
    rows = []
    with torch.no_grad():
        for key in options.models:
            name, make = cases[key]
            case = make()
            for backend in options.backends:
                rows += compare(name, backend, case)
    report("sensitivity", rows)


if __name__ == "__main__":
    main()
