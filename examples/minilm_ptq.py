"""Quantize the pretrained all-MiniLM-L6-v2 and compare it with float: accuracy, size, latency.

Calibrates on 64 docstring bodies of Python's standard library, then lets the first line of 400
other docstrings find its body.
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
from common import check_in_fresh_process, file_size, interleaved_latency, print_table
from minilm_data import embed, load_pairs, model_folder, retrieval
from tqdm import tqdm

from torch_quant import Quantizer, cosine, export_torchscript, recipes

BATCH = 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a local folder with weights and a tokenizer")
    parser.add_argument(
        "--backend",
        choices=("reference", "onednn", "ipex"),
        help="default: the best of this machine",
    )
    treatment = parser.add_mutually_exclusive_group()
    treatment.add_argument(
        "--smooth", type=float, help="SmoothQuant's alpha everywhere; default: 0.8 where it helps"
    )
    treatment.add_argument(
        "--fast", action="store_true", help="no smoothing, and biases as they are"
    )
    parser.add_argument("--output", type=Path, default=Path("out/minilm_int8.pt"))
    parser.add_argument("--pairs", type=int, default=400, help="held-out pairs (default 400)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--verbose", action="store_true", help="show the log of torch_quant")
    return parser.parse_args()


def main() -> None:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    options = parse()
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor")
    torch.set_num_threads(options.threads)

    folder = options.model or model_folder()
    if not (folder / "config.json").is_file():
        raise SystemExit(f"--model {folder}: no config.json there; expected a model folder")
    model = AutoModel.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = load_pairs(held_out=options.pairs)

    # The three lines: calibrate, run data, quantize.
    smooth = "auto" if options.smooth is None else options.smooth
    recipe = recipes.fast() if options.fast else recipes.int8_static(smooth=smooth)
    quantizer = Quantizer(options.backend, qconfig=recipe)
    calib_model = quantizer.calib(model.eval())
    for body in tqdm(data.calibration, desc="calibrating", unit="text"):
        embed(calib_model, tokenizer, [body])  # one at a time: padding would widen the ranges
    quant_model = quantizer.quantize(model)

    print(f"\n{quantizer.coverage(model)}\n")

    tokens = torch.randint(1000, 20000, (BATCH, 128))
    mask = torch.ones_like(tokens)
    mask[0, 100:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    scripted = export_torchscript(quant_model, inputs, options.output)

    queries = [pair.query for pair in data.held_out]
    bodies = [pair.body for pair in data.held_out]
    vectors = {}
    for name, each in (("float32", model), ("int8", quant_model)):
        vectors[name] = [
            torch.cat([embed(each, tokenizer, texts[i : i + 16]) for i in progress])
            for texts, what in ((queries, "queries"), (bodies, "bodies"))
            for progress in [tqdm(range(0, len(texts), 16), desc=f"{name} {what}", unit="batch")]
        ]
    scores = {name: retrieval(*pair) for name, pair in vectors.items()}
    angle = cosine(torch.cat(vectors["float32"]), torch.cat(vectors["int8"]))

    latency = interleaved_latency(
        {
            "float32": lambda: model(**inputs),
            "int8": lambda: quant_model(**inputs),
            "TorchScript": lambda: scripted(**inputs),
        }
    )
    size, int8_size = file_size(model), options.output.stat().st_size
    speed_up = latency["float32"] / latency["TorchScript"]
    rows = [
        ("retrieval MRR", f"{scores['float32'][0]:.4f}", f"{scores['int8'][0]:.4f}"),
        ("retrieval top-1", f"{scores['float32'][1]:.1%}", f"{scores['int8'][1]:.1%}"),
        ("cosine with float, mean", "1", f"{angle.mean():.4f}"),
        ("cosine with float, worst", "1", f"{angle.min():.4f}"),
        ("file", f"{size / 1e6:.1f} MB", f"{int8_size / 1e6:.1f} MB ({int8_size / size:.1%})"),
        (
            f"latency, eager, {BATCH} x 128",
            f"{latency['float32']:.1f} ms",
            f"{latency['int8']:.1f} ms",
        ),
        (f"latency, TorchScript, {BATCH} x 128", "", f"{latency['TorchScript']:.1f} ms"),
        ("speed-up over eager float32", "1", f"{speed_up:.2f}x"),
        ("multiply-accumulates in int8", "0%", f"{quantizer.plan.coverage:.1%}"),
    ]
    print(f"\nall-MiniLM-L6-v2, {quantizer.backend!r}, {len(queries)} pairs, ", end="")
    print(f"{options.threads} thread(s), torch {torch.__version__}\n")
    print_table(rows, "float32", "int8")

    with torch.no_grad():
        expected = scripted(**inputs)["last_hidden_state"]
    ipex = quantizer.backend.name == "ipex"
    needs = "intel_extension_for_pytorch" if ipex else "torch_quant"
    check_in_fresh_process(options.output, (tokens, mask), expected, "last_hidden_state", needs)
    print(f"\n{options.output}: loaded in a fresh process, the outputs are the same bit for bit")


if __name__ == "__main__":
    main()
