"""A small language model of free weights: a decoder trained on the standard library's own source.

Six minutes of one thread, once; the result is kept. Its weights have never been rounded, which
those of many a pretrained file have. A million tokens are few, so matrices are trained by Muon
(Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024), which learns more
of each than Adam does, and everything else by AdamW.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from llm_data import CACHE, Text, kept, perplexity, python_sources, sample

__all__ = ["small_decoder"]

LENGTH = 256
BATCH = 8
STEPS = 400
VOCABULARY = 2048


def small_decoder(blocks: int = 80) -> tuple[nn.Module, Any, Text]:
    """(A Llama of 5.2 M parameters in float32 and eval mode, its tokenizer, text in blocks of 256).

    Of every 20 source files, one is for evaluation only; calibration is on what it was trained on.

    Args:
        blocks: of the text to evaluate on, at most.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = kept(CACHE / "stdlib-decoder", _train)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    training, held_out = _sources()
    text = Text(
        _blocks(tokenizer, training)[:256],
        _blocks(tokenizer, held_out)[:blocks],
        f"source of {len(training)} and {len(held_out)} other files of the standard library",
    )
    return model.eval().requires_grad_(False), tokenizer, text


def _sources() -> tuple[list[str], list[str]]:
    """Source files to train on, and others."""
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in python_sources()]
    random.Random(0).shuffle(texts)
    others = len(texts) // 20
    return texts[others:], texts[:others]


def _blocks(tokenizer: Any, texts: list[str]) -> Tensor:
    """All whole blocks of the texts, ``[blocks, LENGTH]``, in an order that is fixed."""
    rows = [torch.tensor(ids) for ids in tokenizer(texts).input_ids if len(ids) >= LENGTH]
    blocks = torch.cat([ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH) for ids in rows])
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]


def _train(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    training, _ = _sources()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_pairs(training),
        eos_token="<end>",
        clean_up_tokenization_spaces=False,
    )
    blocks = _blocks(tokenizer, training)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2 * LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    optimizers, schedules = _optimizers(model)
    progress = tqdm(range(STEPS), desc="training a small decoder", unit="step")
    order = torch.randint(len(blocks), (STEPS, BATCH))
    for step in progress:
        batch = blocks[order[step]]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()
        progress.set_postfix_str(f"loss {float(loss):.2f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _optimizers(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """(Optimizers, their schedules): up within 20 steps, and down to 0 from there."""
    inner = {id(x) for name, x in model.named_parameters() if x.dim() == 2 and "embed" not in name}
    matrices = [x for x in model.parameters() if id(x) in inner]
    others = [x for x in model.parameters() if id(x) not in inner]
    made = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def share(step: int) -> float:
        return min((step + 1) / 20, 1 - step / STEPS)

    return made, [torch.optim.lr_scheduler.LambdaLR(each, share) for each in made]


def _byte_pairs(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    torch.set_num_threads(parser.parse_args().threads)
    model, tokenizer, text = small_decoder()
    size = sum(each.numel() for each in model.parameters())
    found = perplexity(model, text.evaluation)
    print(f"{size / 1e6:.1f} M parameters, {text.sources}: perplexity {found:.2f}")
    print(sample(model, tokenizer, "def read(self, path):\n"))


if __name__ == "__main__":
    main()
