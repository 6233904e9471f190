"""Training through the quantization beside torchao: accuracy afterwards, and what a step costs.

A perceptron on scikit-learn's digits whose weights have few bits in groups of 32, activations in
float: what both packages train. All begin with the same float model, see the same batches, and use
the same optimizer. Steps of all take turns in one process, in processor time. A row of a package
that is not installed is left out: ``pip install -e .[peers,examples]``.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness import report
from torch import Tensor, nn

# isort: split
from digits_data import Digits, load_digits_split, train

from torch_quant import Quantizer, recipes

GROUP = 32
Made = tuple[nn.Module, Any]
"""A model in training, and the groups for its optimizer."""


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def floating(model: nn.Module, bits: int, lr: float) -> Made:
    return model, [{"params": list(model.parameters()), "lr": lr}]


def ours(method: str) -> Callable[[nn.Module, int, float], Made]:
    """This package's, with scales that are learned or stay."""

    def make(model: nn.Module, bits: int, lr: float) -> Made:
        quantizer = Quantizer(
            "reference", qconfig=recipes.weight_only(bits=bits, group_size=GROUP), capture="whole"
        )
        example = torch.zeros(2, 1, 8, 8)
        made = quantizer.qat(model.eval(), method, edge_bits=None, example_inputs=(example,))
        return made, quantizer.parameter_groups(made, lr=lr, scale_lr=0.01, relative=True)

    return make


def torchao(learned: bool) -> Callable[[nn.Module, int, float], Made]:
    """torchao's, whose scales are learned, or follow the extremes of the weights."""

    def make(model: nn.Module, bits: int, lr: float) -> Made:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import (
            IntxFakeQuantizeConfig,
            QATConfig,
            initialize_fake_quantizers,
        )

        how = IntxFakeQuantizeConfig(
            getattr(torch, f"int{bits}"),
            group_size=GROUP,
            is_dynamic=not learned,
            range_learning=learned,
        )
        quantize_(model, QATConfig(weight_config=how, step="prepare"))
        if learned:
            initialize_fake_quantizers(model, (torch.zeros(2, 1, 8, 8),))
        return model, [{"params": list(model.parameters()), "lr": lr}]

    return make


PEERS = {
    "float": floating,
    "torch_quant lsq": ours("lsq"),
    "torch_quant fixed": ours("fixed"),
    "torchao, learned scales": torchao(True),
    "torchao": torchao(False),
}


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    return float((model(data.images).argmax(1) == data.labels).double().mean())


def batches(data: Digits, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(data.labels), (64,), generator=generator)
        yield data.images[rows], data.labels[rows]


def compared(seed: int, bits: int, steps: int, lr: float) -> dict[str, tuple[float, float, float]]:
    """Each -> held-out accuracy before and after, and milliseconds of a step."""
    training, held_out = load_digits_split()
    torch.manual_seed(seed)
    start = train(perceptron(), training, epochs=5)
    peers = dict(PEERS)
    if importlib.util.find_spec("torchao") is None:
        peers = {name: make for name, make in peers.items() if not name.startswith("torchao")}
    made = {name: make(copy.deepcopy(start), bits, lr) for name, make in peers.items()}
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
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the peers, about themselves
    torch.set_num_threads(1)
    found = [
        compared(seed, options.bits, options.steps, options.lr) for seed in range(options.seeds)
    ]
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
    report("qat_peers", rows, bits=options.bits, steps=options.steps, seeds=options.seeds)


if __name__ == "__main__":
    main()
