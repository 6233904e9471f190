"""A decoder of 3 billion parameters is quantized from files to files: CPU seconds and memory.

The sizes are those of Llama 3.2 3B, the weights random, on which neither depends. They are written
in bfloat16, a file for each block, and removed at the end unless --folder names where they stay.

Memory is what the process has at most: all that is resident, and of that what no file backs (the
pages of a file that is read count as resident, and the system takes them back when it wants). A row
ends with a comparison: one block of the result computes what the same block gives that was
quantized in memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import keep, kept_rows, report
from safetensors.torch import save_file
from torch import Tensor

from torch_quant import GPTQ, Quantizer, load_checkpoint, quantize_checkpoint, recipes
from torch_quant.checkpoints.files import CheckpointFiles

SIZES: dict[str, dict[str, Any]] = {
    "3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "10m": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
}
"""By how many parameters there are; the small one is to try the program."""
DTYPE = torch.float32
"""Of what is not integers: with rounded scales, a block would not compute the very same."""
LENGTH = 512
"""Tokens of a text."""
INDEX = "model.safetensors.index.json"


def write(folder: Path, sizes: dict[str, Any]) -> int:
    """Write a float checkpoint, a file at a time; returns how many parameters it has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    config = model.config
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json_string())
    files: dict[str, dict[str, Tensor]] = {}
    for name, x in model.named_parameters():
        part = name.split(".")[2] if ".layers." in name else "outer"
        files.setdefault(f"model-{part}.safetensors", {})[name] = x
    generator = torch.Generator().manual_seed(0)
    for file, tensors in files.items():
        made = {
            name: torch.ones(x.shape, dtype=torch.bfloat16)
            if x.dim() == 1
            else torch.empty(x.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, x in tensors.items()
        }
        save_file(made, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(x.numel() for x in model.parameters())


def quantizer(method: str) -> Quantizer:
    """int4 in groups of 128; embedding and head, which are tied, in float."""
    made = GPTQ(full_range=True) if method == "gptq" else None
    return Quantizer(
        recipes.int4_weight_only(group_size=128, method=made),
        overrides={"model.embed_tokens": None, "lm_head": None},
        capture="modules",
    )


def texts(sizes: dict[str, Any], tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(sizes["vocab_size"], (tokens // LENGTH, 1, LENGTH), generator=generator)
    return list(ids)


@contextmanager
def resident() -> Iterator[Callable[[], dict[str, float]]]:
    """A function that says how many GiB the process has had at most; Linux alone."""

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) / 2**20 for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
    done, most = threading.Event(), status("RssAnon")

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, status("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: {"resident GiB": status("VmHWM"), "of that in no file GiB": most}
    finally:
        done.set()
        thread.join()


def one(method: str, source: Path, target: Path, tokens: int) -> dict[str, Any]:
    """CPU seconds and memory, in this process."""
    sizes = json.loads((source / "config.json").read_text())
    batches = texts(sizes, tokens) if method == "gptq" else None
    with resident() as most:
        wall, start = time.monotonic(), time.process_time()
        quantize_checkpoint(quantizer(method), source, target, batches=batches, dtype=DTYPE)
        return {
            "s": time.process_time() - start,
            "elapsed s": time.monotonic() - wall,
            **most(),
            "float GiB": bytes_of(source),
            "int4 GiB": bytes_of(target),
        }


def bytes_of(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30


def shortened(source: Path, blocks: int, target: Path) -> Path:
    """The same model with its first blocks alone; its files are those of ``source``."""
    about = json.loads((source / "config.json").read_text())
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    kept = {
        name: file
        for name, file in weight_map.items()
        if ".layers." not in name or int(name.split(".")[2]) < blocks
    }
    target.mkdir(exist_ok=True)
    for file in set(kept.values()):
        if not (target / file).exists():
            (target / file).symlink_to((source / file).absolute())
    (target / "config.json").write_text(json.dumps(about | {"num_hidden_layers": blocks}))
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": kept}))
    return target


def single(folder: Path, block: int, target: Path) -> Path:
    """A checkpoint of the same model with one of its blocks alone."""
    about = json.loads((folder / "config.json").read_text())
    target.mkdir()
    (target / "config.json").write_text(json.dumps(about | {"num_hidden_layers": 1}))
    files, held = CheckpointFiles(folder), {}
    for name in files:
        if ".layers." not in name or f".layers.{block}." in name:
            short = name.replace(f".layers.{block}.", ".layers.0.")
            held[short] = files.tensor(name).clone()
    save_file(held, target / "model.safetensors", metadata={"format": "pt"})
    return target


def agrees(method: str, source: Path, target: Path, tokens: int) -> dict[str, Any]:
    """Whether a block of the result gives what that block does, quantized in memory.

    By GPTQ it is the first, whose inputs need no block before it; else the last.
    """
    from transformers import AutoModelForCausalLM

    sizes = json.loads((source / "config.json").read_text())
    block = 0 if method == "gptq" else sizes["num_hidden_layers"] - 1
    with tempfile.TemporaryDirectory(dir=target.parent) as parent, torch.inference_mode():
        ids = texts(sizes, LENGTH)[0][:, :64]
        loaded = load_checkpoint(single(target, block, Path(parent) / "int4"))
        ours = loaded.get_decoder()(ids)[0]
        del loaded
        folder = single(source, block, Path(parent) / "float")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        whole = quantizer(method)
        if method == "gptq":
            whole.round_weights(model, texts(sizes, tokens))
        quantized = whole.quantize(model, example_inputs={"input_ids": ids[:, :16]})
        theirs, floats = quantized.get_decoder()(ids)[0], model.get_decoder()(ids)[0]
        ratio = (theirs - ours).norm() / floats.norm()
        error = (floats - ours).norm() / floats.norm()
    return {"block": block, "apart": float(ratio), "int4 apart from float": float(error)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", choices=SIZES, default="3b")
    parser.add_argument("--methods", nargs="+", choices=["rtn", "gptq"], default=["rtn", "gptq"])
    parser.add_argument(
        "--blocks", type=int, help="of the model for gptq, whose memory does not depend on them"
    )
    parser.add_argument("--tokens", type=int, default=512, help="for gptq (default 512)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--folder", type=Path, help="for the files; kept, with what is made")
    parser.add_argument("--again", action="store_true", help="measure rows that are known too")
    parser.add_argument("--step", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.step:
        what, method, source, target, tokens = options.step
        step = one if what == "one" else agrees
        print(json.dumps(step(method, Path(source), Path(target), int(tokens))))
        return
    name = f"llm_lazily_{options.parameters}"
    settings = {"tokens": options.tokens, "threads": options.threads}
    rows = {} if options.again else {r["row"]: r for r in kept_rows(name, settings)}

    def run(what: str, method: str, source: Path, target: Path) -> dict[str, Any]:
        command = [sys.executable, __file__, "--threads", str(options.threads), "--step", what]
        command += [method, str(source), str(target), str(options.tokens)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    with tempfile.TemporaryDirectory() as parent:
        folder = options.folder or Path(parent)
        source = folder / options.parameters
        if not source.exists():
            print(f"{write(source, SIZES[options.parameters]) / 1e9:.2f} billion parameters")
        for method in options.methods:
            blocks = SIZES[options.parameters]["num_hidden_layers"]
            row, given, few = method, source, options.blocks if method == "gptq" else None
            if few:
                row = f"{method}, {few} of {blocks} blocks"
                given = shortened(source, few, folder / f"{options.parameters}-{few}")
            target = folder / f"{given.name}-{method}"
            if row not in rows:
                measured = run("one", method, given, target)
                rows[row] = {"row": row, **measured, **run("agrees", method, given, target)}
                if few:
                    rows[row]["s projected"] = rows[row]["s"] * blocks / few
                keep(name, list(rows.values()), **settings)
    report(name, list(rows.values()), **settings)


if __name__ == "__main__":
    main()
