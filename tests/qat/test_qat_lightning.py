"""Lightning's Trainer trains a QAT model as it is, and resumes from its checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_quant import QConfig, Quantizer, QuantSpec

pl = pytest.importorskip("pytorch_lightning", reason="pip install pytorch-lightning, torch>=2.9")

pytestmark = pytest.mark.usefixtures("grad")


class Digits(pl.LightningModule):  # type: ignore[misc]
    """What a user of Lightning writes: the network is an attribute."""

    def __init__(self, net: nn.Module, groups: Any) -> None:
        super().__init__()
        self.net, self.groups, self.losses = net, groups, []

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.groups)


def images() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return x[:640], torch.tensor(digits.target)[:640]


def made() -> tuple[Quantizer, nn.Module, Digits]:
    """The quantizer, its QAT model of 4 bits, and the module around that."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2),
        nn.ReLU(), nn.Flatten(), nn.Linear(144, 10),
    )  # fmt: skip
    weight = QuantSpec.of(bits=4, signed=True, symmetric=True, per_channel=True)
    quantizer = Quantizer("reference", qconfig=QConfig(input=QuantSpec.of(bits=4), weight=weight))
    with torch.no_grad():
        quantizer.calib(net.eval())(images()[0])
    qat_model = quantizer.qat(net)
    groups = quantizer.parameter_groups(qat_model, lr=1e-2, scale_lr=1e-3)
    return quantizer, qat_model, Digits(qat_model, groups)


def fit(module: Digits, folder: Path, epochs: int, checkpoint: str | None = None) -> str:
    """Path of the checkpoint behind the last epoch."""
    quiet: dict[str, Any] = dict.fromkeys(
        ("enable_progress_bar", "logger", "enable_model_summary"), False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning's, on the number of workers
        trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=folder, **quiet)
        trainer.fit(
            module, DataLoader(TensorDataset(*images()), batch_size=64), ckpt_path=checkpoint
        )
    return str(trainer.checkpoint_callback.best_model_path)


def test_it_learns_and_what_was_trained_is_deployed(tmp_path: Path) -> None:
    quantizer, qat_model, module = made()
    fit(module, tmp_path, 3)
    assert sum(module.losses[-10:]) < 0.7 * sum(module.losses[:10])
    x = images()[0]
    with torch.no_grad():
        assert torch.equal(quantizer.quantize(qat_model.eval())(x), qat_model(x))


def test_resuming_from_a_checkpoint_changes_nothing(tmp_path: Path) -> None:
    _, whole, module = made()
    fit(module, tmp_path / "whole", 2)
    _, _, module = made()
    checkpoint = fit(module, tmp_path / "first", 1)
    _, resumed, module = made()
    fit(module, tmp_path / "second", 2, checkpoint)
    assert len(module.losses) == 10  # the steps of one epoch
    states = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
