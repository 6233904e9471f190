"""``torch-quant generate``: let a quantized language model write."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torch_quant_cli.artifact import Artifact, is_artifact
from torch_quant_cli.exits import Failed
from torch_quant_cli.models import Source, float_model
from torch_quant_cli.running import Result, command
from torch_quant_cli.texts import tokenizer_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["cli"]


@click.command("generate", short_help="Let a language model write.")
@click.argument("folder")
@click.option("--prompt", required=True, help="What the model goes on from; - reads stdin.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="0 takes the likeliest token each time.",
)
@click.option("--chat", is_flag=True, help="Put the prompt into the tokenizer's chat template.")
@click.option("--seed", default=0, show_default=True, help="With a temperature.")
@command
def cli(
    folder: str, prompt: str, max_new_tokens: int, temperature: float, chat: bool, seed: int
) -> Result:  # fmt: skip
    """Let the model in FOLDER write, and tell how fast it does.

    FOLDER is one of torch-quant quantize, a checkpoint of quantized weights (compressed-tensors,
    GPTQ), or a float model of Hugging Face, to compare with.

    \b
    Examples:
      torch-quant generate my-llm-int8 --prompt "the model of the" --max-new-tokens 8
      echo "the cat" | torch-quant generate my-llm-int8 --prompt - --json
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise Failed("--prompt is empty: give the text that the model goes on from")
    model, home = _loaded(folder)
    import torch

    able = getattr(model, "can_generate", None)
    if not (callable(able) and able()):
        kind = type(model).__name__
        raise Failed(f"the model of {folder} writes no text: {kind} has no language model head")
    tokenizer = tokenizer_of(home, "--prompt")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise Failed(f"{home}: its tokenizer has no chat template; leave out --chat")
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if ids.shape[-1] == 0:
        raise Failed("--prompt has no token that the tokenizer knows")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    start = time.perf_counter()
    with torch.no_grad():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            **({"do_sample": False} | sampling),
        )
    seconds = time.perf_counter() - start
    new = found[0, ids.shape[-1] :] if not _seq2seq(model) else found[0]
    written = tokenizer.decode(new, skip_special_tokens=True)
    speed = len(new) / seconds if seconds else 0.0
    return Result(
        f"{text}{'' if chat else ' '}{written}\n\n{len(new)} tokens in {seconds:.2f} s, "
        f"{speed:.1f} a second, the prompt of {ids.shape[-1]} and the first call included",
        {"prompt": text, "text": written, "tokens": [int(x) for x in new], "seconds": seconds,
         "tokens_per_second": speed},
    )  # fmt: skip


def _seq2seq(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _loaded(folder: str) -> tuple[Any, Path | None]:
    """The model, and the folder with its tokenizer."""
    import json

    if is_artifact(folder):
        artifact = Artifact(folder)
        return artifact.quant_model(), artifact.hugging_face
    place = Path(folder)
    if not (place / "config.json").is_file():
        raise Failed(f"{folder} is no folder of a language model: it has no config.json")
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise Failed(f"{place / 'config.json'} is no JSON: {error}") from error
    if config.get("quantization_config"):
        from torch_quant import load_checkpoint

        return load_checkpoint(folder), place
    return float_model(Source("folder", folder)), place
