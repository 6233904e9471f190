"""Every decoder of the zoo generates with its cache; ``make test-long`` takes all of them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from flows import BACKENDS
from models import tokens
from thinning import LONG
from torch import Tensor
from zoo import DIFFERENT, ZOO
from zoo_base import VOCAB
from zoo_text import DECODERS, ENCODER_DECODERS

from torch_quant import Quantizer, sqnr

OTHERWISE = {
    "gpt2": "has a test of its own",
    "gpt2_cache": "has a test of its own",
    "llama": "has a test of its own",
    "llama_cache": "has a test of its own",
    "bart": "has no head",
    "bart_cache": "has no head",
}
NAMES = [entry.name for entry in (*DECODERS, *ENCODER_DECODERS) if entry.name not in OTHERWISE]
CHOSEN = [name for name in NAMES if LONG or name in DIFFERENT]
OLD_NAME = "past_key_values"
"""What transformers called a cache before 5.24."""
FLOOR = 15.0
"""dB, over ten steps: one token a step, whose noise the cache keeps."""
LOWER = {"mixtral": 6.0}  # where two experts are close, noise chooses: 10 to 18 dB


def decode(
    name: str, model: Any, proxy: Any, count: int, forced: Tensor | None = None
) -> list[Tensor]:
    """The logits of the last position at each of ``count`` calls, the prompt's first.

    Args:
        name: of the architecture.
        model: the float model.
        proxy: what decodes.
        count: calls.
        forced: tokens (batch, count) to go on with, instead of the most likely ones.
    """
    given = {key: x for key, x in ZOO[name].inputs(2).items() if key != "decoder_input_ids"}
    prompt = tokens(2, 5, VOCAB, low=3)
    own = "input_ids"
    if model.config.is_encoder_decoder:
        own = "decoder_input_ids"
        mask = given["attention_mask"]
        given = {"encoder_outputs": model.get_encoder()(**given), "attention_mask": mask}
    else:
        given = {}
    cached = "cache" if "cache" in inspect.signature(model.forward).parameters else OLD_NAME
    ids, cache, found = prompt, None, []
    for i in range(count):
        outputs = proxy(**given, **{own: ids, cached: cache}, use_cache=True)
        cache = outputs[cached]
        found.append(outputs.logits[:, -1])
        ids = found[-1].argmax(-1, keepdim=True) if forced is None else forced[:, i : i + 1]
    return found


@pytest.mark.parametrize("name", CHOSEN)
def test_the_zoos_decoders_generate(name: str) -> None:
    model = ZOO[name].build()
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    decode(name, model, calib_model, 4)
    expected = torch.stack(decode(name, model, model, 10))
    assert torch.equal(torch.stack(decode(name, model, calib_model, 10)), expected)
    followed = expected.argmax(-1).T  # so that one close call does not change all that follows
    for backend in sorted({"reference", "onednn"} & set(BACKENDS)):
        quant_model = quantizer.quantize(model, backend=backend)
        found = torch.stack(decode(name, model, quant_model, 10, followed))
        assert sqnr(expected, found) > LOWER.get(name, FLOOR)
