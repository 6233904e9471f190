"""Weight-only formats of other packages beside this one's: same weights, text, bits and groups.

Each row is a process of its own. A package that is not installed is left out; rows of earlier runs
are kept, so that packages that do not go together are measured from several environments:
``python benchmarks/llm_peers.py --peers hqq nncf``. Only the linear layers of the decoder are
quantized, except where a row says otherwise; embedding and head stay in float32. Seconds to
quantize are CPU seconds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from decoding import cache_name, measure
from harness import keep, kept_rows, peak_memory, report
from llm import BLOCKS, METHODS, loaded, needs_data, quantizer_of
from llm_data import perplexity
from torch import Tensor, nn
from tqdm import tqdm

GROUP = 64
Make = Callable[[Any, Any, Tensor], Any]
"""(float model, tokenizer, calibration ``[blocks, length]``) -> quantized model"""


@dataclass(frozen=True)
class Peer:
    """A row: the package that makes it, the name of its module, what it is, and how."""

    package: str
    module: str
    what: str
    make: Make


def ours(wanted: str, method: str, backend: str | None) -> Make:
    def make(model: Any, tokenizer: Any, calibration: Tensor) -> Any:
        quantizer = quantizer_of(wanted, method, backend, "float")
        if needs_data(method):
            quantizer.round_weights(model, [block[None] for block in calibration])
        return quantizer.quantize(model, example_inputs={"input_ids": calibration[:1, :16]})

    return make


def hqq(model: Any, tokenizer: Any, calibration: Tensor) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=GROUP, axis=1)
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                made = HQQLinear(child, config, compute_dtype=torch.float32, device="cpu")
                setattr(parent, name, made)
    return model


def torchao(name: str) -> Make:
    def make(model: Any, tokenizer: Any, calibration: Tensor) -> Any:
        import torchao.quantization as package
        from torchao.quantization.granularity import PerGroup

        config = {
            "int8": lambda: package.Int8WeightOnlyConfig(),
            "int8 dynamic": lambda: package.Int8DynamicActivationInt8WeightConfig(),
            "int4": lambda: package.IntxWeightOnlyConfig(
                weight_dtype=torch.int4, granularity=PerGroup(GROUP)
            ),
        }[name]()
        package.quantize_(model.model.layers, config)
        return model

    return make


def nncf(**options: Any) -> Make:
    """On torch, where embedding and head get 8 bits unless they are ignored."""

    def make(model: Any, tokenizer: Any, calibration: Tensor) -> Any:
        import nncf as package

        batches = [{"input_ids": block[None], "use_cache": False} for block in calibration]
        return package.compress_weights(
            model,
            mode=package.CompressWeightsMode.INT4_SYM,
            group_size=GROUP,
            ratio=1.0,
            dataset=package.Dataset(batches),
            subset_size=len(batches),
            **options,
        )

    return make


def auto_round(iterations: int) -> Make:
    def make(model: Any, tokenizer: Any, calibration: Tensor) -> Any:
        from auto_round import AutoRound

        tuner = AutoRound(
            model, tokenizer, scheme="W4A16", group_size=GROUP, iters=iterations,
            dataset=[{"input_ids": block[None]} for block in calibration],
            seqlen=calibration.shape[1], nsamples=len(calibration), batch_size=4, device_map="cpu",
        )  # fmt: skip
        tuned, _ = tuner.quantize()
        return tuned

    return make


def llmcompressor(method: str) -> Make:
    def make(model: Any, tokenizer: Any, calibration: Tensor) -> Any:
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

        weights = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": GROUP}
        given = {
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head"],
        }
        rounding = GPTQModifier if method == "gptq" else QuantizationModifier
        blocks = [{"input_ids": block} for block in calibration]
        return oneshot(
            model=model,
            dataset=torch.utils.data.DataLoader(blocks, batch_size=1),
            recipe=[*([AWQModifier()] if method == "awq" else []), rounding(**given)],
            num_calibration_samples=len(blocks),
            max_seq_length=calibration.shape[1],
        )

    return make


def gptqmodel(model: Any, tokenizer: Any, calibration: Tensor) -> Any:
    """It takes a folder and writes one, which its own kernel for a CPU reads."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses one, its choice on two cores
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    with tempfile.TemporaryDirectory() as parent:
        for each in (model, tokenizer):
            each.save_pretrained(f"{parent}/float")
        config = QuantizeConfig(bits=4, group_size=GROUP, sym=True, desc_act=True)
        made = GPTQModel.load(f"{parent}/float", config, device="cpu", backend=BACKEND.TORCH)
        made.quantize(
            [{"input_ids": x.tolist(), "attention_mask": [1] * len(x)} for x in calibration],
            batch_size=1,
        )
        made.save(f"{parent}/int4")
        read = GPTQModel.load(f"{parent}/int4", device="cpu", backend=BACKEND.TORCH)
        return read.model


def peers() -> dict[str, Peer]:
    made = {
        "hqq": Peer("hqq", "hqq", "4 bits g64, asymmetric, float zero", hqq),
        "torchao int8": Peer("torchao", "torchao", "int8 weight-only", torchao("int8")),
        "torchao int8 dynamic": Peer(
            "torchao", "torchao", "int8, activations per token", torchao("int8 dynamic")
        ),
        "torchao int4": Peer("torchao", "torchao", "int4 g64, to nearest", torchao("int4")),
        "nncf": Peer("nncf", "nncf", "int4 g64, to nearest; head int8", nncf()),
        "nncf awq": Peer("nncf", "nncf", "int4 g64, AWQ; head int8", nncf(awq=True)),
        "nncf awq scale": Peer(
            "nncf", "nncf", "int4 g64, AWQ, scale estimation; head int8",
            nncf(awq=True, scale_estimation=True),
        ),
        "nncf gptq": Peer("nncf", "nncf", "int4 g64, GPTQ; head int8", nncf(gptq=True)),
        "auto-round 0": Peer("auto-round", "auto_round", "int4 g64, rounding", auto_round(0)),
        "auto-round 20": Peer("auto-round", "auto_round", "int4 g64, 20 steps", auto_round(20)),
        **{
            f"llmcompressor {method}": Peer(
                "llmcompressor", "llmcompressor", f"int4 g64, {method}", llmcompressor(method)
            )
            for method in ("rtn", "awq", "gptq")
        },
        "gptqmodel": Peer("gptqmodel", "gptqmodel", "int4 g64, GPTQ, act-order", gptqmodel),
    }  # fmt: skip
    for wanted in ("int8_weight_only", "int8_dynamic", "int4 g64", "uint4 g64, float zeros"):
        methods = ["rtn"] if "int8" in wanted else METHODS
        for method in methods:
            name = f"torch_quant {wanted} {method}"
            made[name] = Peer(
                "torch_quant", "torch_quant", f"{wanted}, {method}", ours(wanted, method, None)
            )
            made[f"{name} simulated"] = Peer(
                "torch_quant", "torch_quant", f"{wanted}, {method}, REFERENCE",
                ours(wanted, method, "reference"),
            )  # fmt: skip
    return made


@torch.no_grad()
def one(options: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    (name,) = options.peers
    peer = peers()[name]
    model, tokenizer, text = loaded(options.model)
    length = BLOCKS[options.model]
    calibration = text.calibration[: options.calibration // length]
    evaluation = text.evaluation[: options.tokens // length]
    exact, _, _ = loaded(options.model)  # packages change the model that they are given
    half = type(model)(model.config).bfloat16().eval()
    half.load_state_dict(model.state_dict())
    row: dict[str, Any] = {"row": name, "what": peer.what}
    row["version"] = importlib.metadata.version(peer.package)
    with peak_memory() as peak:
        start = time.process_time()
        with torch.enable_grad():
            made = peer.make(model, tokenizer, calibration)
        row["quantize s"], row["peak MB"] = time.process_time() - start, peak()
    row["perplexity"] = perplexity(made, evaluation, title=name)
    models = {"float32": exact, "bfloat16": half, "quantized": made}
    times = measure(models, cache_name(exact), options.decode)
    return row | {f"token, {key} ms": value for key, value in times.items()}


def main() -> None:
    known = peers()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(BLOCKS), default="smollm2")
    parser.add_argument(
        "--peers", nargs="+", default=list(known), choices=tuple(known),
        metavar="PEER", help=f"of {', '.join(known)}; default: all that are installed",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=3072, help="evaluated (default 3072)")
    parser.add_argument(
        "--calibration", type=int, default=16384, help="tokens to calibrate on (default 16384)"
    )
    parser.add_argument("--decode", type=int, default=30, help="tokens decoded with each model")
    parser.add_argument("--minutes", type=float, default=10, help="a row may take (default 10)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(one(options)))
        return
    table = "llm_peers" if options.model == "smollm2" else "llm_small_peers"
    settings = {key: getattr(options, key) for key in ("model", "tokens", "calibration")}
    rows = {row["row"]: row for row in kept_rows(table, settings)}
    installed = [name for name in options.peers if importlib.util.find_spec(known[name].module)]
    for name in tqdm(installed, unit="row"):
        command = [sys.executable, __file__, "--one", "--peers", name, "--model", options.model]
        command += ["--tokens", str(options.tokens), "--calibration", str(options.calibration)]
        command += ["--decode", str(options.decode)]
        rows[name] = {"row": name, "what": known[name].what, **outcome(command, options.minutes)}
        keep(table, list(rows.values()), **settings)
    report(table, list(rows.values()), **settings)


def outcome(command: list[str], minutes: float) -> dict[str, Any]:
    """What the process prints last, or why there is nothing."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60 * minutes
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {minutes:g} minutes"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"failed": lines[-1][:200]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
