"""``generate()`` and pipelines of language models with quantized weights alone, or dynamically.

The yardstick for weights alone is the float model with the rounded weights put in: a quantized
model must write the very same tokens, whatever way it is asked.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import pytest
import torch
from flows import BACKENDS
from test_decoding import VOCABULARY
from test_generate import NEW, taught
from thinning import rarely
from torch import Tensor, nn
from transformers import StaticCache

import torch_quant
from torch_quant import QConfig, Quantizer, recipes

NAMES = ("llama", "qwen2", "gpt2")
GROUP = 32
WEIGHT_ONLY = {
    "int8_weight_only": recipes.int8_weight_only(),
    "int4_weight_only": recipes.int4_weight_only(group_size=GROUP),
    "int4_asymmetric": recipes.int4_weight_only(group_size=GROUP, symmetric=False),
}
RECIPES = {**WEIGHT_ONLY, "int8_dynamic": recipes.int8_dynamic()}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 8, "temperature": 2.0},
}
known = functools.cache(taught)
"""(model, inputs); tests leave the model as it is."""


def quantized(model: nn.Module, qconfig: QConfig, backend: str = "reference") -> Any:
    """The quantized model; skips where the backend has no kernel for these formats."""
    quantizer = Quantizer(backend, qconfig=qconfig, capture="modules")
    example = {"input_ids": torch.arange(6).reshape(1, 6)}
    plan = quantizer.coverage(model, example).plan
    left = [site for site in plan.values() if site.op == "linear" and not site.quantized]
    if left:
        pytest.skip(f"{backend} keeps {left[0].name} in float: {left[0].reason}")
    return quantizer.quantize(model, example_inputs=example)


def rounded(model: nn.Module, quant_model: nn.Module) -> Any:
    """A copy of the float model that computes with the numbers that the codes stand for."""
    state = quant_model.state_dict()
    made: Any = copy.deepcopy(model)
    names = [name for name, _ in made.named_parameters() if f"{name}_scale" in state]
    assert len(names) >= 5
    for name in names:
        codes, scale = state[name].float(), state[f"{name}_scale"]
        groups = scale.shape[1] if scale.dim() > 1 else 1
        zero = state.get(f"{name}_zero_point", torch.zeros(1)).float()
        blocks = codes.unflatten(1, (groups, -1))
        if zero.numel() > 1:
            blocks = blocks - zero.reshape(-1, groups, 1)
        values = (blocks * scale.reshape(-1, groups, 1)).flatten(1)
        module = made.get_submodule(name.rpartition(".")[0])
        transposed = type(module).__name__ == "Conv1D"  # its weight is [in, out]
        made.get_parameter(name).data = values.T if transposed else values
    return made


def written(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    torch.manual_seed(0)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    found: Tensor = model.generate(input_ids=ids, attention_mask=mask, **options)
    return found


@pytest.mark.thin
@pytest.mark.parametrize("recipe", WEIGHT_ONLY)
@pytest.mark.parametrize("name", NAMES)
def test_reference_writes_what_a_float_model_of_the_rounded_weights_does(
    name: str, recipe: str
) -> None:
    model, inputs = known(name)
    quant_model = quantized(model, WEIGHT_ONLY[recipe])
    exact = rounded(model, quant_model)
    for way, options in WAYS.items():
        expected = written(exact, inputs["input_ids"], **options)
        assert torch.equal(written(quant_model, inputs["input_ids"], **options), expected), way


@pytest.mark.thin
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", sorted({"onednn"} & set(BACKENDS)))
def test_kernels_write_what_reference_does(backend: str, name: str, recipe: str) -> None:
    model, inputs = known(name)
    quant_model = quantized(model, RECIPES[recipe], backend)
    expected = quantized(model, RECIPES[recipe])
    for way in ("greedy", "no cache", "static cache", "beams"):
        found = written(quant_model, inputs["input_ids"], **WAYS[way])
        assert torch.equal(found, written(expected, inputs["input_ids"], **WAYS[way])), way


@pytest.mark.parametrize("recipe", RECIPES)
def test_padding_changes_nothing(recipe: str) -> None:
    model, inputs = known("llama")
    quant_model = quantized(model, RECIPES[recipe])
    ids, mask = inputs["input_ids"].clone(), torch.ones_like(inputs["input_ids"])
    ids[1, :2], mask[1, :2] = 0, 0  # padded on the left, as decoders are
    alone = torch.cat([written(quant_model, ids[:1]), written(quant_model, ids[1:, 2:])], 1)[0]
    together = written(quant_model, ids, mask)
    assert torch.equal(torch.cat([together[0], together[1, 2:]]), alone)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_saved_model_goes_on_writing(recipe: str, tmp_path: Any) -> None:
    model, inputs = known("llama")
    quant_model = quantized(model, RECIPES[recipe])
    torch_quant.save(quant_model, tmp_path / "saved")
    with torch.device("meta"):
        empty: Any = type(model)(model.config)
    empty.generation_config = model.generation_config
    loaded = torch_quant.load(tmp_path / "saved", model=empty)
    expected = written(quant_model, inputs["input_ids"])
    assert torch.equal(written(loaded, inputs["input_ids"]), expected)


def words() -> Any:
    """A tokenizer for which each token is a word; the first three are none of the text's."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<unk>": 1, "<end>": 2}
    vocabulary |= {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def spelled(ids: Tensor) -> list[str]:
    return [" ".join(f"w{i}" for i in row.tolist()) for row in ids]


@pytest.mark.parametrize("recipe", RECIPES)
def test_tokens_are_streamed(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextIteratorStreamer, TextStreamer

    model, inputs = known("llama")
    quant_model, tokenizer = quantized(model, RECIPES[recipe]), words()
    ids = inputs["input_ids"][:1]
    assert spelled(ids) == [tokenizer.decode(ids[0])]
    (expected,) = spelled(written(quant_model, ids))
    written(quant_model, ids, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.split() == expected.split()
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True)
    written(quant_model, ids, streamer=pieces)
    assert "".join(pieces).split() == expected.split()[ids.shape[1] :]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_pipeline_takes_a_quantized_model(recipe: str) -> None:
    from transformers import pipeline

    model, inputs = known("llama")
    quant_model = quantized(model, RECIPES[recipe])
    writer = pipeline("text-generation", model=quant_model, tokenizer=words())
    texts = spelled(inputs["input_ids"])
    texts[1] = texts[1].partition(" ")[2]  # shorter: the pipeline pads
    options = {"max_new_tokens": NEW, "do_sample": False, "return_tensors": True}
    for batch in (1, 2):
        found = [
            each[0]["generated_token_ids"] for each in writer(texts, batch_size=batch, **options)
        ]
        assert found[0] == written(quant_model, inputs["input_ids"][:1])[0].tolist()
        assert (
            found[1][-NEW:] == written(quant_model, inputs["input_ids"][1:, 1:])[0, -NEW:].tolist()
        )


@pytest.mark.parametrize("recipe", [rarely("int4_weight_only"), rarely("int8_dynamic")])
def test_a_compiled_step_writes_the_same(recipe: str) -> None:
    """A prompt and steps of one token with a static cache: one graph each, and no break."""
    model, inputs = known("llama")
    backend = "onednn" if "onednn" in BACKENDS else "reference"
    quant_model, ids = quantized(model, RECIPES[recipe], backend), inputs["input_ids"][:1]
    named = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in named else "past_key_values"

    @torch.no_grad()
    def write(each: Any) -> list[int]:
        cache, at, token, tokens = StaticCache(model.config, max_cache_len=32), 0, ids, []
        for _ in range(NEW):
            places = torch.arange(at, at + token.shape[1])
            out = each(input_ids=token, position_ids=places[None], **{name: cache})
            at, token = at + token.shape[1], out.logits[:, -1:].argmax(-1)
            tokens.append(int(token))
        return tokens

    torch._dynamo.reset()
    compiled_model = torch.compile(quant_model, backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    assert write(compiled_model) == write(quant_model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
