"""Text as token ids, by the tokenizer of the model's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_quant_cli.exits import Failed
from torch_quant_cli.running import needed

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TOKENIZER_FILES", "Texts", "spans", "tokenized", "tokenizer_of"]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What a folder holds of its tokenizer."""


@dataclass(frozen=True)
class Texts:
    """How texts become inputs.

    Args:
        source: the file, for messages.
        tokenizer: a folder that has one; None for that of the model.
        length: the most tokens; None for 128, and 512 where the model writes text.
        samples: how many at most.
        batch_size: texts in a call.
        cut: samples that no batch holds together with those behind them.
    """

    source: str
    tokenizer: str | None
    length: int | None
    samples: int
    batch_size: int
    cut: int | None = None


def spans(count: int, size: int, cut: int | None) -> list[tuple[int, int]]:
    """Where batches begin and end; none reaches over ``cut``.

    >>> spans(7, 3, 4), spans(4, 3, None)
    ([(0, 3), (3, 4), (4, 7)], [(0, 3), (3, 4)])
    """
    first = count if cut is None else min(cut, count)
    parts = ((0, first), (first, count))
    return [(i, min(i + size, end)) for begin, end in parts for i in range(begin, end, size)]


def tokenizer_of(folder: Path | None, what: str) -> Any:
    """The tokenizer that ``folder`` has.

    Raises:
        Failed: it has none; says what to give.
    """
    held = folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES)
    if folder is None or not held:
        where = "the model is no Hugging Face folder" if folder is None else f"{folder} has none"
        raise Failed(
            f"{what} is text, which needs a tokenizer, and {where}: give --tokenizer FOLDER, or "
            "token ids as a .npz"
        )
    needed("transformers", what=f"the tokenizer of {folder}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        first = " ".join(str(error).split())[:300]
        raise Failed(f"{folder}: its tokenizer cannot be loaded: {first}") from error


def tokenized(
    lines: list[str], how: Texts, model: nn.Module, folder: Path | None, names: list[str]
) -> list[Any]:
    """Inputs of a model, from texts.

    A model that writes text gets full windows of the texts one behind the other, any other one text
    a sample, cut at ``length`` tokens.
    """
    given = Path(how.tokenizer) if how.tokenizer else folder
    tokenizer = tokenizer_of(given, f"--data {how.source}")
    config: Any = getattr(model, "config", None)
    seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    can_generate: Any = getattr(model, "can_generate", None)
    writes = bool(can_generate and can_generate()) and not seq2seq
    most = getattr(config, "max_position_embeddings", None)
    length = how.length or (512 if writes else 128)
    length = min(length, most) if isinstance(most, int) and most > 0 else length
    if writes:
        return _windows(lines, tokenizer, how, length)
    if how.batch_size > 1 and tokenizer.pad_token is None:
        raise Failed("--batch-size: the tokenizer has no padding token, so texts go one by one")
    found: list[Any] = []
    texts = lines[: how.samples]
    for start, end in spans(len(texts), how.batch_size, how.cut):
        encoded = tokenizer(
            texts[start:end],
            padding=how.batch_size > 1,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        inputs = {name: x for name, x in encoded.items() if name in names}
        if not inputs:
            raise Failed(
                f"--data {how.source} is text, and the model takes {', '.join(names)}, no token "
                "ids: give its inputs as a .npz"
            )
        if inputs["input_ids"].shape[-1] == 0:
            continue
        if seq2seq and "decoder_input_ids" in names:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        found.append(inputs)
    return found


def _windows(lines: list[str], tokenizer: Any, how: Texts, length: int) -> list[Any]:
    """Full windows of text, as language models are calibrated on."""
    import torch

    ids: list[int] = []
    needed_tokens = length * how.samples
    for line in lines:
        ids += tokenizer(f"{line}\n")["input_ids"]
        if len(ids) >= needed_tokens:
            break
    length = min(length, len(ids))
    if length == 0:
        return []
    rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)][: how.samples]
    return [
        {"input_ids": torch.tensor(rows[i:j])} for i, j in spans(len(rows), how.batch_size, how.cut)
    ]
