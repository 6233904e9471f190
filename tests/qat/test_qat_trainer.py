"""Hugging Face's Trainer trains a QAT model as it is, and resumes from its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import zoo_model

from torch_quant import Quantizer

pytestmark = pytest.mark.usefixtures("grad")

pytest.importorskip("accelerate")

VOCABULARY = 128


def texts(count: int) -> list[dict[str, Any]]:
    """Token ids; the label is whether more of them are large than small."""
    ids = torch.randint(3, VOCABULARY, (count, 16), generator=torch.Generator().manual_seed(0))
    labels = ((ids > VOCABULARY // 2).sum(1) > 8).long()
    mask = torch.ones(16, dtype=torch.long)
    return [
        {"input_ids": row, "attention_mask": mask, "labels": label}
        for row, label in zip(ids, labels, strict=True)
    ]


def unlabelled() -> dict[str, torch.Tensor]:
    """The first 32 texts as one batch."""
    names = ("input_ids", "attention_mask")
    return {name: torch.stack([x[name] for x in texts(32)]) for name in names}


def classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, num_labels=2,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings = {
        "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 16,
        "learning_rate": 5e-4, "save_steps": 4, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "seed": 0, "dataloader_pin_memory": False,
    }  # fmt: skip
    data = texts(256)
    return Trainer(
        model=model,
        args=TrainingArguments(**settings | options),
        train_dataset=data,
        eval_dataset=data[:64],
    )


def trained() -> tuple[Quantizer, nn.Module]:
    model, quantizer = classifier(), Quantizer("reference")
    batch = {
        name: torch.stack([x[name] for x in texts(32)]) for name in ("input_ids", "attention_mask")
    }
    with torch.no_grad():
        quantizer.calib(model)(**batch)
    return quantizer, quantizer.qat(model)


@pytest.mark.long("ten seconds; ``tests/integrations`` has a Trainer that trains and resumes")
# Trainer's own, about what PyTorch will change.
@pytest.mark.filterwarnings("ignore")
def test_trainer_trains_evaluates_and_resumes(tmp_path: Path) -> None:
    quantizer, qat_model = trained()
    run = trainer(qat_model, tmp_path / "one")
    start = qat_model.bert.encoder.layer[0].attention.self.query.weight_scale.detach().clone()
    before = run.evaluate()["eval_loss"]
    run.train()
    after = run.evaluate()["eval_loss"]
    assert after < before
    scale = qat_model.bert.encoder.layer[0].attention.self.query.weight_scale
    assert not torch.equal(scale, start)

    other, resumed = trained()
    again = trainer(resumed, tmp_path / "one")
    again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-4"))
    for name, x in qat_model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], x), name

    state = json.loads((tmp_path / "one" / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8
    batch = {
        name: torch.stack([x[name] for x in texts(32)]) for name in ("input_ids", "attention_mask")
    }
    with torch.no_grad():
        ours, theirs = (
            q.quantize(m)(**batch).logits for q, m in ((quantizer, qat_model), (other, resumed))
        )
        assert torch.equal(ours, qat_model.eval()(**batch).logits)
    assert torch.equal(ours, theirs)
    assert zoo_model("bert").config.model_type == qat_model.config.model_type
