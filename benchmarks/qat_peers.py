"""Training through the quantization beside torchao and NNCF: accuracy, and what a step costs.

A perceptron on scikit-learn's digits. With torchao, weights have few bits in groups of 32, and
activations are in float. NNCF has no groups there: it takes part with ``--group 0 --bits 4``, and
with ``--activations --bits 8``, where activations have 8 bits and one scale each. All begin with
the same float model, see the same batches, and use the same optimizer. Steps of all take turns in
one process, in processor time. A row of a package that is not installed is left out: ``pip install
-e .[peers,examples]``, and ``pip install nncf`` into an environment of its own, since it wants
other versions; it compiles its kernels at the first call (NNCF_EXTENSION_LOAD_TIMEOUT=0 waits).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from harness import report
from torch import Tensor, nn

# isort: split
from digits_data import Digits, load_digits_split, train

from torch_quant import Quantizer, QuantSpec, recipes

Made = tuple[nn.Module, Any]
"""A model in training, and the groups for its optimizer."""


@dataclass(frozen=True)
class Format:
    """What is trained through.

    Args:
        bits: of weights.
        group: inputs that share a scale; 0 for a scale for each output.
        activations: whether these have 8 bits, one scale each; else they are in float.
    """

    bits: int
    group: int
    activations: bool


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def floating(model: nn.Module, format_: Format, lr: float, images: Tensor) -> Made:
    return model, [{"params": list(model.parameters()), "lr": lr}]


def ours(method: str) -> Callable[[nn.Module, Format, float, Tensor], Made]:
    """This package's, with scales that are learned or stay."""

    def make(model: nn.Module, format_: Format, lr: float, images: Tensor) -> Made:
        qconfig = recipes.weight_only(bits=format_.bits, group_size=format_.group or None)
        if format_.activations:
            weight = QuantSpec.of(bits=format_.bits, signed=True, symmetric=True, per_channel=True)
            qconfig = replace(recipes.fast(), weight=weight)
        quantizer = Quantizer("reference", qconfig=qconfig, capture="whole")
        quantizer.calib(model.eval())(images)
        made = quantizer.qat(model, method, edge_bits=None)
        return made, quantizer.parameter_groups(made, lr=lr, scale_lr=0.01, relative=True)

    return make


def torchao(learned: bool) -> Callable[[nn.Module, Format, float, Tensor], Made]:
    """torchao's, whose scales are learned, or follow the extremes of the weights."""

    def make(model: nn.Module, format_: Format, lr: float, images: Tensor) -> Made:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import (
            IntxFakeQuantizeConfig,
            QATConfig,
            initialize_fake_quantizers,
        )

        how = IntxFakeQuantizeConfig(
            getattr(torch, f"int{format_.bits}"),
            group_size=format_.group,
            is_dynamic=not learned,
            range_learning=learned,
        )
        quantize_(model, QATConfig(weight_config=how, step="prepare"))
        if learned:
            initialize_fake_quantizers(model, (images[:2],))
        return model, [{"params": list(model.parameters()), "lr": lr}]

    return make


def nncf(model: nn.Module, format_: Format, lr: float, images: Tensor) -> Made:
    """NNCF's, whose scales are learned."""
    import nncf

    nncf.set_log_level("ERROR")
    data = nncf.Dataset(list(images.split(64)))
    if format_.activations:
        made = nncf.quantize(model.eval(), data)
    else:
        made = nncf.compress_weights(
            model.eval(),
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=-1,
            all_layers=True,
            dataset=data,
            compression_format=nncf.CompressionFormat.FQ,
        )
    trained = [x for x in made.parameters() if x.is_floating_point()]
    for each in trained:  # compress_weights freezes the weights themselves
        each.requires_grad_()
    return made, [{"params": trained, "lr": lr}]


PEERS = {
    "float": floating,
    "torch_quant lsq": ours("lsq"),
    "torch_quant fixed": ours("fixed"),
    "torchao, learned scales": torchao(True),
    "torchao": torchao(False),
    "nncf": nncf,
}


def takes(name: str, format_: Format) -> bool:
    """Whether a peer is installed, and has the format."""
    package = name.partition(",")[0]
    if package == "torchao":
        serves = format_.group > 0 and not format_.activations
    elif package == "nncf":
        serves = format_.group == 0 and format_.bits == (8 if format_.activations else 4)
    else:
        return True
    return serves and importlib.util.find_spec(package) is not None


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    return float((model(data.images).argmax(1) == data.labels).double().mean())


def batches(data: Digits, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(data.labels), (64,), generator=generator)
        yield data.images[rows], data.labels[rows]


def compared(
    seed: int, format_: Format, steps: int, lr: float
) -> dict[str, tuple[float, float, float]]:
    """Each -> held-out accuracy before and after, and milliseconds of a step."""
    training, held_out = load_digits_split()
    torch.manual_seed(seed)
    start = train(Perceptron(), training, epochs=5)
    made = {
        name: make(copy.deepcopy(start), format_, lr, training.images[:512])
        for name, make in PEERS.items()
        if takes(name, format_)
    }
    before = {name: accuracy(model.eval(), held_out) for name, (model, _) in made.items()}
    optimizers = {name: torch.optim.AdamW(groups) for name, (_, groups) in made.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for images, labels in batches(training, steps, seed):
        for name, (model, _) in made.items():
            begun = time.process_time()
            loss = F.cross_entropy(model.train()(images), labels)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            times[name].append((time.process_time() - begun) * 1e3)
    return {
        name: (before[name], accuracy(model.eval(), held_out), statistics.median(times[name]))
        for name, (model, _) in made.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=2, help="of weights (default 2)")
    parser.add_argument(
        "--group", type=int, default=32, help="inputs with one scale (default 32); 0: all"
    )
    parser.add_argument("--activations", action="store_true", help="these have 8 bits")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the peers, about themselves
    torch.set_num_threads(1)
    group = 0 if options.activations else options.group
    format_ = Format(options.bits, group, options.activations)
    found = [compared(seed, format_, options.steps, options.lr) for seed in range(options.seeds)]
    means = {
        name: [sum(each[name][i] for each in found) / len(found) for i in range(3)]
        for name in found[0]
    }
    rows = [
        {
            "training": name,
            "accuracy before": before,
            "after": after,
            "ms a step": ms,
            "x float": ms / means["float"][2],
        }
        for name, (before, after, ms) in means.items()
    ]
    report("qat_peers", rows, steps=options.steps, seeds=options.seeds, **asdict(format_))


if __name__ == "__main__":
    main()
