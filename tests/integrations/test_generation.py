"""``generate`` with compiled steps: the tokens of the model itself, for every size and model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import DECODERS, ids, quantized
from thinning import OLDEST

from torch_quant import BackendUnavailable, InvalidConfig, Quantizer, load, recipes, save

pytest.importorskip("transformers", reason="transformers is missing: pip install 'transformers>=5'")
from torch_quant.integrations.generation import compiled_steps

COMPILES = pytest.mark.skipif(
    OLDEST, reason="torch 2.8's compiler fails on transformers 5: pip install torch==2.13.0"
)


def tokens(model: Any, rows: int = 1, length: int = 5, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        **ids(rows, length), max_new_tokens=6, do_sample=False, pad_token_id=0, **options
    )
    return found


@COMPILES
@pytest.mark.long("a minute: the compiler works four times")
def test_the_same_tokens_with_every_size_and_model() -> None:
    """Two models of one class and one process, which differ in what their layers are made of."""
    model = DECODERS["llama"]()
    int4 = quantized(model, backend="onednn")
    int8 = quantized(model, recipes.int8_weight_only(), backend="onednn")
    steps = compiled_steps(int4)
    others = compiled_steps(int8)
    for rows, length in ((1, 5), (1, 9), (2, 3), (1, 5)):
        for each, options in ((int4, steps), (int8, others)):
            assert torch.equal(tokens(each, rows, length, **options), tokens(each, rows, length))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(tokens(int4, 2, 3, **steps), tokens(int4, 2, 3))
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError):
        tokens(quantized(model), **compiled_steps(quantized(model)))


@COMPILES
def test_weights_that_change_and_copies() -> None:
    model = DECODERS["tied"]()
    quant_model = quantized(model, backend="onednn")
    steps = compiled_steps(quant_model)
    before = tokens(quant_model, **steps)
    copied = copy.deepcopy(pickle.loads(pickle.dumps(quant_model)))  # the compiler works once
    assert torch.equal(tokens(copied, **compiled_steps(copied)), before)
    with torch.no_grad():
        quant_model.model.norm.weight.neg_()
    after = tokens(quant_model)
    assert not torch.equal(after, before)
    assert torch.equal(tokens(quant_model, **steps), after)


@COMPILES
def test_models_with_compiled_steps_are_pickled_and_copied() -> None:
    """The compiled float model, and one that was quantized from it."""
    model = DECODERS["llama"]()
    compiled_steps(model)
    quant_model = quantized(model)
    compiled_steps(quant_model)
    for each in (model, quant_model):
        again = pickle.loads(pickle.dumps(each))
        assert torch.equal(tokens(again), tokens(each))
        assert torch.equal(tokens(copy.deepcopy(each)), tokens(each))


@COMPILES
@pytest.mark.long("the compiler works three times")
def test_layers_and_sizes_that_change() -> None:
    model = DECODERS["tied"]()
    steps = compiled_steps(model)
    assert torch.equal(tokens(model, **steps), tokens(model))
    model.resize_token_embeddings(120)
    assert torch.equal(tokens(model, **steps), tokens(model))
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()
    assert torch.equal(tokens(model, **steps), tokens(model))


@COMPILES
def test_what_the_compiler_cannot_follow_is_refused() -> None:
    import transformers

    model = DECODERS["llama"]()
    with pytest.raises(InvalidConfig, match="a proxy records what its layers see"):
        compiled_steps(Quantizer("reference").calib(model))
    torch.manual_seed(0)
    options = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2}
    config = transformers.T5Config(num_layers=1, decoder_start_token_id=0, **options)
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    x = torch.ones(1, 4, dtype=torch.long)
    quantizer = Quantizer("reference", qconfig=recipes.int8_weight_only())
    inputs = {"input_ids": x, "decoder_input_ids": x}
    quant_model = quantizer.quantize(t5, example_inputs=inputs)
    with pytest.raises(InvalidConfig, match=r"the weight of .*wo, to see its dtype"):
        compiled_steps(quant_model)


@COMPILES
@pytest.mark.long("as long as the one above")
def test_a_float_model_and_a_loaded_one(tmp_path: Path) -> None:
    model = DECODERS["qwen2"]()
    assert torch.equal(tokens(model, **compiled_steps(model)), tokens(model))
    quant_model = quantized(model, backend="onednn")
    steps = compiled_steps(quant_model)
    save(quant_model, tmp_path / "int4")
    loaded = load(tmp_path / "int4", model)
    assert torch.equal(tokens(loaded, **compiled_steps(loaded)), tokens(quant_model, **steps))


def test_what_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    if not OLDEST:
        expected = r"compiled_steps\(Linear\): expected a language model"
        with pytest.raises(InvalidConfig, match=expected):
            compiled_steps(torch.nn.Linear(2, 2))
    monkeypatch.setenv("CXX", "no-such-compiler")
    wrong = "torch 2.13" if OLDEST else "there is no no-such-compiler: install one"
    with pytest.raises(BackendUnavailable, match=wrong):
        compiled_steps(DECODERS["llama"]())
