"""scikit-learn's bundled digits, and a training loop of a few seconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

__all__ = ["Digits", "load_digits_split", "train"]


@dataclass(frozen=True)
class Digits:
    """Images ``[n, 1, 8, 8]`` with zero mean and unit variance, labels ``[n]``."""

    images: Tensor
    labels: Tensor


def load_digits_split(held_out: int = 500) -> tuple[Digits, Digits]:
    """(training, held-out) digits, shuffled by a fixed seed."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None]
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    kept, out = order[held_out:], order[:held_out]
    return Digits(images[kept], labels[kept]), Digits(images[out], labels[out])


def train(model: nn.Module, data: Digits, *, epochs: int, batch: int = 64) -> nn.Module:
    """Train with AdamW and a one-cycle schedule; returns the model in eval mode."""
    steps = epochs * (len(data.labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in tqdm(range(epochs), desc="training", unit="epoch"):
        order = torch.randperm(len(data.labels))
        for rows in order.split(batch):
            if len(rows) < batch:
                continue
            loss = F.cross_entropy(model(data.images[rows]), data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()
