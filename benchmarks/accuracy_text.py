"""all-MiniLM-L6-v2 and SmolLM2 on the text that a machine has."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from typing import Any

import torch
import torch.nn.functional as F
from accuracy_task import Inputs, Task
from harness import minilm
from minilm_data import Pair, Split, load_pairs, model_folder, retrieval
from torch import Tensor, nn

from torch_quant import cosine

__all__ = ["Descriptions", "Docstrings", "Perplexity"]

BATCH = 16


class Docstrings(Task):
    """The first line of a docstring finds its body among those of 400."""

    name, kind, metric = "MiniLM, docstrings", "transformer", "MRR"
    dynamic = True

    def __init__(self) -> None:
        self.pairs = self.split()
        self.count = len(self.pairs.held_out)

    def split(self) -> Split:
        return load_pairs()

    def make(self) -> nn.Module:
        return minilm()

    def calibration(self) -> list[Inputs]:
        return self._tokens(self.pairs.calibration, 1)  # padding would widen ranges

    def held_out(self) -> list[Inputs]:
        queries = self._tokens([pair.query for pair in self.pairs.held_out], BATCH)
        return queries + self._tokens([pair.body for pair in self.pairs.held_out], BATCH)

    def _tokens(self, texts: list[str], batch: int) -> list[Inputs]:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(model_folder())
        options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
        parts = [texts[i : i + batch] for i in range(0, len(texts), batch)]
        made = [tokenizer(part, **options) for part in parts]
        return [{key: each[key] for key in ("input_ids", "attention_mask")} for each in made]

    def read(self, output: Any, inputs: Inputs) -> Tensor:
        """Sentence embeddings by masked mean pooling, as in training."""
        hidden = super().read(output, inputs)
        mask = inputs["attention_mask"][..., None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def score(self, outputs: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
        vectors = torch.cat(outputs)
        angle = cosine(torch.cat(expected), vectors)
        mrr, top = retrieval(vectors[: self.count], vectors[self.count :])
        return {
            "MRR": mrr, "top-1 %": 100 * top,
            "cosine": float(angle.mean()), "worst cosine": float(angle.min()),
        }  # fmt: skip


class Descriptions(Docstrings):
    """The synopsis of a Debian package finds its description."""

    name = "MiniLM, descriptions of packages"

    def split(self) -> Split:
        if shutil.which("dpkg-query") is None:
            raise SystemExit("no dpkg-query: descriptions of packages are Debian's")
        command = ["dpkg-query", "--show", "--showformat", r"${Description}\n"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found: dict[str, Pair] = {}
        for each in re.findall(r"^\S.*(?:\n .*)*", text, re.MULTILINE):
            first, _, rest = each.partition("\n")
            body = " ".join(rest.replace("\n .\n", "\n").split())
            if len(first) >= 20 and len(body) >= 80:
                found.setdefault(body, Pair(first.strip(), body))
        pairs = list({pair.query: pair for pair in found.values()}.values())
        random.Random(0).shuffle(pairs)
        return Split([pair.body for pair in pairs[:64]], pairs[64:464])


class Logits(nn.Module):
    """A language model without its cache, as exporters and every runtime can have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits  # type: ignore[no-any-return]


class Perplexity(Task):
    """SmolLM2-135M-Instruct on docstrings and descriptions of packages."""

    name, kind, metric = "SmolLM2-135M", "transformer", "perplexity"

    def __init__(self) -> None:
        from llm_data import load_text, smollm2

        model, tokenizer = smollm2()
        self.model = Logits(model).eval()
        self.text = load_text(tokenizer, calibration=8192, evaluation=10240)

    def make(self) -> nn.Module:
        return self.model

    def calibration(self) -> list[Inputs]:
        return [{"input_ids": block[None]} for block in self.text.calibration]

    def held_out(self) -> list[Inputs]:
        return [{"input_ids": block[None]} for block in self.text.evaluation]

    def read(self, output: Any, inputs: Inputs) -> Tensor:
        """What each token costs, in nats."""
        logits, ids = super().read(output, inputs), inputs["input_ids"]
        return F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")

    def score(self, outputs: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
        return {"perplexity": float(torch.cat(outputs).mean().exp())}

    def close(self, outputs: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
        cost, exact = torch.cat(outputs), torch.cat(expected)
        return {"nats from float": float((cost - exact).abs().mean())}
