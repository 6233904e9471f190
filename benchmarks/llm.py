"""Language models with rounded weights: what each format and weight method costs and gives.

accuracy: perplexity, bytes, CPU seconds and memory of quantizing, for each format and method, and
what the model says then. Each row is a process of its own, so that its memory is its own.
speed: milliseconds a decoded token and for a prompt of 512, beside float32 and bfloat16.

The model is SmolLM2-135M-Instruct or, with --model small, that of benchmarks/small_decoder.py.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import torch
from decoding import cache_name, measure
from harness import interleaved_latency, keep, kept_rows, peak_memory, report
from llm_data import Text, load_text, perplexity, sample, smollm2
from small_decoder import small_decoder
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import torch_quant
from torch_quant import FLOAT, PerGroup, QConfig, Quantizer, QuantSpec, recipes
from torch_quant.convert.quantized import QuantizedModule
from torch_quant.core.methods import (
    TRANSFORMS,
    WEIGHT_METHODS,
    Method,
    Transform,
    WeightMethod,
    read_transform,
    read_weight_method,
)
from torch_quant.errors import QuantError
from torch_quant.native.library import instruction_sets

OUTER = ("model.embed_tokens", "lm_head")
"""Embedding and head: tied in both models, and where 4 bits cost the most."""
BLOCKS = {"smollm2": 512, "small": 256}


def three_bits(group: int) -> QConfig:
    spec = QuantSpec.of(bits=3, signed=True, symmetric=True, granularity=PerGroup(group))
    return QConfig(FLOAT, spec)


def with_float_zeros(bits: int, group: int) -> QConfig:
    return recipes.weight_only(bits=bits, group_size=group, symmetric=False, float_zero_points=True)


FORMATS: dict[str, Callable[[], QConfig]] = {
    "int8_weight_only": recipes.int8_weight_only,
    "int8_dynamic": recipes.int8_dynamic,
    "uint4 g32": lambda: recipes.int4_weight_only(group_size=32, symmetric=False),
    "uint4 g64": lambda: recipes.int4_weight_only(group_size=64, symmetric=False),
    "uint4 g64, float zeros": lambda: with_float_zeros(4, 64),
    "uint4 g32, float zeros": lambda: with_float_zeros(4, 32),
    "uint3 g64, float zeros": lambda: with_float_zeros(3, 64),
    "int4 g32": lambda: recipes.int4_weight_only(group_size=32),
    "int4 g64": lambda: recipes.int4_weight_only(group_size=64),
    "int4 g96": lambda: recipes.int4_weight_only(group_size=96),  # divides all layers of SmolLM2
    "int4 g128": lambda: recipes.int4_weight_only(group_size=128),
    "int3 g64": lambda: three_bits(64),
}


def _is_plain(member: type[Method]) -> bool:
    """Whether it works without options, on floats: SmoothQuant is for quantized activations."""
    required = [x for x in fields(member) if x.default is MISSING and x.default_factory is MISSING]
    return not required and member.name != "smoothquant"


METHODS = [
    *(
        member.name
        for member in (*WEIGHT_METHODS.values(), *TRANSFORMS.values())
        if _is_plain(member)
    ),
    "rtn(full_range=True)",
    "gptq(full_range=True)",
    "awq+rtn(full_range=True)",
    "awq+gptq(full_range=True)",
    "teq+rtn(full_range=True)",
    "autoround(full_range=True)",
]
"""All that are registered, and a few more.

A transform and a weight method may be joined, and each may have options.
"""


def read_method(text: str) -> tuple[WeightMethod | None, tuple[Transform, ...]]:
    """What a member of METHODS says.

    >>> read_method("awq(clip=False)+gptq(damping=0.1)")[0].damping
    0.1
    """
    method, transforms = None, []
    for part in text.split("+"):
        call = ast.parse(part, mode="eval").body
        given = call.keywords if isinstance(call, ast.Call) else []
        data = {str(each.arg): ast.literal_eval(each.value) for each in given}
        data["name"] = part.partition("(")[0]
        if data["name"] in TRANSFORMS:
            transforms.append(read_transform(data))
        else:
            method = read_weight_method(data)
    return method, tuple(transforms)


def needs_data(method: str) -> bool:
    made, transforms = read_method(method)
    return bool(transforms) or (made is not None and (made.wants_blocks or made.wants_statistics))


def loaded(model: str) -> tuple[nn.Module, Any, Text]:
    """(model, tokenizer, text)"""
    if model == "small":
        return small_decoder()
    made, tokenizer = smollm2()
    return made, tokenizer, load_text(tokenizer)


def quantizer_of(wanted: str, method: str, backend: str | None, head: str) -> Quantizer:
    """A quantizer to one of FORMATS; ``head`` says what embedding and head are."""
    qconfig = FORMATS[wanted]()
    made, transforms = read_method(method)
    qconfig = replace(qconfig, method=made, transforms=transforms)
    outer = {"int8": recipes.int8_weight_only(), "float": None}
    overrides = dict.fromkeys(OUTER, outer[head]) if head != "same" and "int8" not in wanted else {}
    return Quantizer(backend, qconfig=qconfig, overrides=overrides, capture="modules")


def saved_size(model: nn.Module) -> int:
    """Bytes of the folder that the model is saved in."""
    with tempfile.TemporaryDirectory() as parent:
        if isinstance(model, QuantizedModule):
            torch_quant.save(model, f"{parent}/model")
        else:
            model.save_pretrained(f"{parent}/model")  # type: ignore[operator]
        return sum(path.stat().st_size for path in Path(parent).rglob("*") if path.is_file())


@contextmanager
def spent(folder: Path | None, peak: Callable[[], float]) -> Iterator[Callable[[], list[float]]]:
    """A function that says CPU seconds and MB so far, those of interrupted processes included.

    Args:
        folder: where they are kept, every few seconds; None to keep nothing.
        peak: MB of this process.
    """
    file = None if folder is None else folder / "spent.json"
    before = json.loads(file.read_text()) if file is not None and file.exists() else [0.0, 0.0]
    start, done = time.process_time(), threading.Event()

    def now() -> list[float]:
        return [before[0] + time.process_time() - start, max(before[1], peak())]

    def keep_on() -> None:
        while file is not None and not done.wait(3.0):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(now()))

    threading.Thread(target=keep_on, daemon=True).start()
    try:
        yield now
    finally:
        done.set()


def accuracy_row(options: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    model, tokenizer, text = loaded(options.model)
    length = BLOCKS[options.model]
    evaluation = text.evaluation[: options.tokens // length]
    (wanted,), (method,) = options.formats, options.methods
    row: dict[str, Any] = {"format": wanted, "method": method, "tokens": evaluation.numel()}
    candidate: Any = model
    if wanted != "float32":
        calibration = text.calibration[: options.calibration // length]
        quantizer = quantizer_of(wanted, method, options.backend, options.head)
        folder = Path(options.folder) / f"{wanted} {method}" if options.folder else None
        with peak_memory() as peak, spent(folder, peak) as so_far:
            if needs_data(method):
                row["calibration"] = calibration.numel()
                batches = [block[None] for block in calibration]
                quantizer.round_weights(model, batches, folder=folder)
            candidate = quantizer.quantize(model, example_inputs={"input_ids": evaluation[:1, :16]})
            row["quantize s"], row["peak MB"] = so_far()
        row["runs on"] = runs_on(quantizer, model)
    row["perplexity"] = perplexity(candidate, evaluation, title=f"{wanted} {method}")
    row["MB"] = saved_size(candidate) / 1e6
    prompt = "def read(self, path):\n" if options.model == "small" else options.prompt
    row["text"] = sample(candidate, tokenizer, prompt)
    return row


def accuracy(options: argparse.Namespace) -> None:
    """Every asked-for row in a process of its own; rows of earlier runs are kept."""
    name = "llm" if options.model == "smollm2" else "llm_small"
    wanted = [("float32", "")]
    for each in options.formats:
        methods = [m for m in options.methods if m == "rtn" or "int8" not in each]
        wanted += [(each, method) for method in methods]
    known = known_rows(name, options)
    for each, method in tqdm([w for w in wanted if w not in known or options.again], unit="row"):
        command = [sys.executable, __file__, "accuracy", "--one", "--formats", each]
        command += ["--methods", method, "--model", options.model, "--head", options.head]
        command += ["--tokens", str(options.tokens), "--calibration", str(options.calibration)]
        command += ["--backend", options.backend] if options.backend else []
        command += ["--folder", options.folder] if options.folder else []
        command += ["--prompt", options.prompt]
        command += ["--threads", str(options.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{each} {method}: the process failed, see above")
        known[each, method] = json.loads(done.stdout.splitlines()[-1])
        keep(name, list(known.values()), **settings(options))
    exact = known["float32", ""]
    columns = (
        "format",
        "method",
        "calibration",
        "perplexity",
        "MB",
        "quantize s",
        "peak MB",
        "runs on",
    )
    rows = []
    for row in known.values():
        ratios = {
            "ratio": row["perplexity"] / exact["perplexity"],
            "share": row["MB"] / exact["MB"],
        }
        rows.append({key: row.get(key) for key in columns} | ratios | {"text": row.get("text")})
    keep(name, rows, **settings(options))
    print(tabulate([{**row, "text": None} for row in rows], headers="keys", floatfmt=".4g"))
    for row in rows:
        print(f"\n{row['format']} {row['method']}: {row['text']}")


def settings(options: argparse.Namespace) -> dict[str, Any]:
    keys = ("model", "tokens", "head", "backend")
    return {key: getattr(options, key) for key in keys}


def known_rows(name: str, options: argparse.Namespace) -> dict[tuple[str, str], dict[str, Any]]:
    """(format, method) -> row of an earlier run with the same settings."""
    found = kept_rows(name, settings(options))
    return {(row["format"], row["method"] or ""): row for row in found}


def runs_on(quantizer: Quantizer, model: nn.Module) -> str:
    """The backend, how many sites it runs in the format, and by which instructions."""
    plan = quantizer.coverage(model).plan
    sites = f"{sum(site.quantized for site in plan.values())} of {len(plan)} sites"
    if quantizer.backend.name == "reference":
        return f"reference, {sites} simulated in float"
    instructions = instruction_sets()
    return (
        f"{quantizer.backend.name}, {sites}, {instructions[-1] if instructions else 'no'} kernels"
    )


@torch.no_grad()
def speed(options: argparse.Namespace) -> None:
    """Decoding with a cache and reading a prompt, each format in turns with both floats."""
    model, _, text = loaded(options.model)
    prompt = text.evaluation[:1]
    half = type(model)(model.config).bfloat16().eval()
    half.load_state_dict(model.state_dict())
    name = "llm_speed" if options.model == "smollm2" else "llm_small_speed"
    asked = {key: getattr(options, key) for key in ("model", "head", "backend", "decode")}
    found = kept_rows(name, asked)
    rows = {row["format"]: row for row in found}
    new = [each for each in options.formats if each not in rows or options.again]
    for wanted in tqdm(new, unit="format"):
        quantizer = quantizer_of(wanted, "rtn", options.backend, options.head)
        row: dict[str, Any] = {"format": wanted}
        rows[wanted] = row
        try:
            quant_model = quantizer.quantize(model, example_inputs={"input_ids": prompt[:, :16]})
        except QuantError as error:
            row["runs on"] = f"no kernel: {str(error).splitlines()[0]}"
            continue
        row["runs on"] = runs_on(quantizer, model)
        models = {"float32": model, "bfloat16": half, "quantized": quant_model}
        decode = measure(models, cache_name(model), options.decode)
        calls = {
            key: lambda each=each: each(input_ids=prompt, use_cache=False)
            for key, each in models.items()
        }
        prefill = interleaved_latency(calls, warm_up=0, rounds=3)
        for what, times in (("token", decode), (f"{prompt.numel()} tokens", prefill)):
            row |= {f"{what}, {key} ms": each for key, each in times.items()}
            row[f"{what}, speed-up"] = times["float32"] / times["quantized"]
        keep(name, list(rows.values()), **asked)
    report(name, list(rows.values()), **asked)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("accuracy", "speed"))
    parser.add_argument("--model", choices=tuple(BLOCKS), default="smollm2")
    parser.add_argument(
        "--formats", nargs="+", default=list(FORMATS), choices=(*FORMATS, "float32"),
        metavar="FORMAT", help=f"of {', '.join(FORMATS)}; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--methods", nargs="+", default=METHODS,
        metavar="METHOD", help=f"such as {', '.join(METHODS)}; default: these",
    )  # fmt: skip
    parser.add_argument(
        "--head", choices=("int8", "same", "float"), default="int8",
        help="embedding and head of formats below int8; default: int8",
    )  # fmt: skip
    parser.add_argument("--backend", help="default: the best of this machine")
    parser.add_argument("--tokens", type=int, default=20480, help="evaluated (default 20480)")
    parser.add_argument(
        "--calibration", type=int, default=8192, help="tokens to calibrate on (default 8192)"
    )
    parser.add_argument("--folder", help="keep rounded blocks there: what is interrupted goes on")
    parser.add_argument("--decode", type=int, default=40, help="tokens decoded with each model")
    parser.add_argument("--prompt", default="What does an operating system do?")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--again", action="store_true", help="measure rows that are known too")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "speed":
        speed(options)
        return
    if options.one:
        print(json.dumps(accuracy_row(options)))
    else:
        accuracy(options)


if __name__ == "__main__":
    main()
