"""A Trainer's model is quantized in one line, after training or by it, on texts of real code."""

from __future__ import annotations

import ast
import functools
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from thinning import rarely
from torch import nn

pytest.importorskip("accelerate")

from torch_quant import InvalidConfig, QConfig, Quantizer, QuantSpec, recipes
from torch_quant.integrations.trainer import (
    QuantizationCallback,
    quantize_trainer,
)
from torch_quant.qat.model import QatModel

pytestmark = [
    pytest.mark.usefixtures("grad"),
    # Trainer's own, about what PyTorch will change.
    pytest.mark.filterwarnings("ignore"),
]

PACKAGES = ("email", "asyncio", "unittest", "ctypes")
LENGTH = 24


@functools.cache
def docstrings() -> list[dict[str, Any]]:
    """Docstrings of the standard library, as ids of words; the label is the package."""
    found = []
    root = Path(sysconfig.get_paths()["stdlib"])
    for label, package in enumerate(PACKAGES):
        for path in sorted((root / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                    words = (ast.get_docstring(node) or "").split()
                    if len(words) >= 4:
                        found.append((words, label))
    known = sorted({word for words, _ in found for word in words})
    ids = {word: 1 + i % 511 for i, word in enumerate(known)}
    examples = []
    for words, label in found:
        row = [ids[word] for word in words[:LENGTH]]
        mask = [1] * len(row) + [0] * (LENGTH - len(row))
        row += [0] * (LENGTH - len(row))
        examples.append({"input_ids": row, "attention_mask": mask, "labels": label})
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    return [examples[i] for i in order][:640]


def classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, num_labels=len(PACKAGES), hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer_of(model: nn.Module, folder: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 48, "per_device_train_batch_size": 32,
        "learning_rate": 3e-3, "save_steps": 24, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "seed": 0, "dataloader_pin_memory": False, "logging_steps": 1000,
    }  # fmt: skip
    examples = docstrings()
    return Trainer(
        model=model,
        args=TrainingArguments(**settings | options),
        train_dataset=examples[128:],
        eval_dataset=examples[:128],
        compute_metrics=accuracy,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a classifier that was trained in float."""
    with torch.enable_grad():
        trainer = trainer_of(classifier(), tmp_path_factory.mktemp("float"), save_steps=1000)
        trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.45  # four packages
    return {name: x.clone() for name, x in trainer.model.state_dict().items()}


FEW_BITS = QConfig(
    input=QuantSpec.of(bits=8),
    weight=QuantSpec.of(bits=2, signed=True, symmetric=True, per_channel=True),
)


def with_weights(weights: dict[str, torch.Tensor]) -> nn.Module:
    model = classifier()
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("dynamic", [False, rarely(True)])
def test_after_training(dynamic: bool, trained: dict[str, torch.Tensor], tmp_path: Path) -> None:
    trainer = trainer_of(with_weights(trained), tmp_path)
    model, expected = trainer.model, trainer.evaluate()["eval_accuracy"]
    quantizer = Quantizer("reference", qconfig=recipes.int8_dynamic() if dynamic else None)
    quantized = quantize_trainer(trainer, quantizer, batches=4)
    assert trainer.model is model
    assert trainer.evaluate()["eval_accuracy"] == expected
    again = trainer_of(quantized, tmp_path)
    # One text in 128 is 0.8 points.
    assert again.evaluate()["eval_accuracy"] == pytest.approx(expected, abs=0.035)


@pytest.mark.long("trains; tests/tuning has the search")
def test_accuracy_aware(trained: dict[str, torch.Tensor], tmp_path: Path) -> None:
    trainer = trainer_of(with_weights(trained), tmp_path)
    quantizer = Quantizer("reference", qconfig=FEW_BITS)
    quantized = quantize_trainer(
        trainer, quantizer, batches=4, metric="accuracy", tolerance=0.03, max_trials=5
    )
    assert quantizer.tuning is not None
    assert len(quantizer.tuning.trials) <= 5
    assert quantizer.tuning.reached
    assert quantized.plan.quantized
    with pytest.raises(InvalidConfig, match=r"metric='f1'; trainer.evaluate\(\) gives .*eval_acc"):
        quantize_trainer(trainer, Quantizer("reference"), batches=1, metric="f1")
    with pytest.raises(InvalidConfig, match="approach='static'"):
        quantize_trainer(trainer, approach="static")


@pytest.mark.long("eight seconds; ``test_qat_training`` trains and resumes")
def test_training_resuming_and_quantizing(trained: dict[str, torch.Tensor], tmp_path: Path) -> None:
    def attached() -> tuple[Any, QuantizationCallback]:
        trainer = trainer_of(with_weights(trained), tmp_path, learning_rate=1e-3)
        callback = QuantizationCallback(
            Quantizer("reference", qconfig=FEW_BITS), batches=4, observe_until=16
        )
        return trainer, callback.attach(trainer)

    trainer, callback = attached()
    assert isinstance(trainer.model, QatModel)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_accuracy"] > before["eval_accuracy"] - 0.02
    assert trainer.model.qat_switches.tolist() == [48, 0, 1, 0]
    batch = trainer.data_collator(docstrings()[:16])
    del batch["labels"]
    quantized = callback.quantized
    assert quantized is not None
    with torch.no_grad():
        logits = quantized(**batch).logits
        assert torch.equal(logits, trainer.model.eval()(**batch).logits)

    resumed, other = attached()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-24"))
    for name, x in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], x), name
    assert other.quantized is not None
    with torch.no_grad():
        assert torch.equal(other.quantized(**batch).logits, logits)


@pytest.mark.long("six seconds; its parts are in the other tests")
def test_training_in_one_line(trained: dict[str, torch.Tensor], tmp_path: Path) -> None:
    trainer = trainer_of(with_weights(trained), tmp_path, learning_rate=1e-3, max_steps=20)
    model, weights = trainer.model, trainer.model.classifier.weight.detach().clone()
    quantizer = Quantizer("reference", qconfig=FEW_BITS)
    quantized = quantize_trainer(
        trainer, quantizer, approach="qat", batches=4, metric="accuracy", tolerance=0.2,
        max_trials=4,
    )  # fmt: skip
    assert trainer.model is model
    assert not torch.equal(model.classifier.weight, weights)
    assert quantizer.tuning is not None
    assert len(quantized.plan.quantized) > 0
