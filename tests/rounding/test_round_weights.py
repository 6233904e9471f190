"""Weights rounded a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from thinning import rarely
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from torch_quant import (
    GPTQ,
    InvalidConfig,
    NotCalibrated,
    QConfig,
    Quantizer,
    RoundToNearest,
    SmoothQuant,
    load,
    recipes,
    register_transform,
    register_weight_method,
    save,
)
from torch_quant.algorithms.blocks import Block
from torch_quant.core.methods import TRANSFORMS, WEIGHT_METHODS, Transform
from torch_quant.core.metrics import sqnr
from torch_quant.passes.base import PassContext
from torch_quant.rounding import chains

INT4 = recipes.int4_weight_only(group_size=16)


def tiny(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()
    if kind == "t5":
        config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        return T5ForConditionalGeneration(config).eval()
    tie = kind == "tied"
    config = LlamaConfig(num_key_value_heads=2, tie_word_embeddings=tie, **sizes)
    return LlamaForCausalLM(config).eval()


def batches(kind: str, count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [{"input_ids": torch.randint(0, 64, (2, 12), generator=generator)} for _ in range(count)]
    if kind == "t5":
        made = [{**each, "decoder_input_ids": each["input_ids"][:, :5]} for each in made]
    return made


def quantizer_of(**settings: Any) -> Quantizer:
    return Quantizer("reference", **{"qconfig": INT4, "capture": "modules", **settings})


@pytest.fixture
def registered() -> Iterator[Callable[[Any], Any]]:
    """Registers classes for one test."""
    methods, transforms = dict(WEIGHT_METHODS), dict(TRANSFORMS)
    yield (
        lambda cls: (
            register_transform(cls) if issubclass(cls, Transform) else register_weight_method(cls)
        )
    )
    for known, before in ((WEIGHT_METHODS, methods), (TRANSFORMS, transforms)):
        known.clear()
        known.update(before)


@dataclass(frozen=True)
class Doubled(Transform):
    """Divides what layers read by powers of two, one for each group: exact, so nothing changes."""

    name = "doubled"
    wants_blocks: ClassVar[bool] = True

    def apply(self, context: PassContext) -> int:
        return 0

    def scale_block(self, block: Block, layers: Any) -> None:
        for reading in block.reading(layers):
            if reading.producer is not None:
                SCALED.append(f"{block.path}.{reading.layers[0].path}".strip("."))
                channels = torch.arange(reading.layers[0].weight.shape[1])
                block.scale(reading, 2.0 ** (channels // 16 % 4 - 1))


SCALED: list[str] = []


@dataclass(frozen=True)
class Watched(RoundToNearest):
    """Rounds to nearest, and keeps what it was given."""

    name = "watched"
    wants_blocks: ClassVar[bool] = True
    wants_targets: ClassVar[bool] = True

    def round_block(self, block: Block, layers: Any) -> None:
        super().round_block(block, layers)
        assert block.targets is not None
        hidden = [sample.hidden if block.path else None for sample in block.samples]
        SEEN.append((block.path, [x.site for x in layers], hidden, block.targets))


SEEN: list[tuple[str, list[str], Any, list[Tensor]]] = []


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "t5"])
def test_rounding_to_nearest_a_block_at_a_time_is_rounding_to_nearest(kind: str) -> None:
    model, data = tiny(kind), batches(kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    whole, plain = quantizer_of(), quantizer_of()
    report = whole.round_weights(model, iter(data), progress=False)
    ours = whole.quantize(model)
    theirs = plain.quantize(model, example_inputs=data[0])
    assert len(report.blocks) == {"t5": 5}.get(kind, 3)
    linear = [site for site in ours.quantization.plan.values() if site.op == "linear"]
    assert set(report.sites) == {site.name for site in linear}
    assert torch.equal(ours(**data[1]).logits, theirs(**data[1]).logits)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert f"{len(report.sites)} weights rounded" in str(report)
    assert all(10 < block.sqnr < 40 for block in report.blocks)  # of 4 bits: about 20 dB


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_blocks_get_what_the_rounded_ones_before_give(kind: str, registered: Any) -> None:
    registered(Watched)
    SEEN.clear()
    model, data = tiny(kind), batches(kind)
    quantizer = quantizer_of(qconfig=replace(INT4, method=Watched()))
    quantizer.round_weights(model, data, progress=False)
    *blocks, (outside, head, _, targets) = SEEN
    assert (outside, len(head)) == ("", 1)
    quant_model = quantizer.quantize(model)
    inputs: dict[str, list[Tensor]] = {}
    made: dict[str, list[Tensor]] = {}
    for path, *_ in blocks:
        quant_model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: inputs.setdefault(path, []).append(
                args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        model.get_submodule(path).register_forward_hook(
            lambda _, args, out, path=path: made.setdefault(path, []).append(
                out[0] if isinstance(out, tuple) else out
            )
        )
    for batch in data:
        quant_model(**batch)
        model(**batch)
    for path, _, hidden, targets in blocks:
        assert [sqnr(a, b) > 80 for a, b in zip(hidden, inputs[path], strict=True)] == [True] * 3
        if not path.startswith("decoder"):  # that reads what the rounded encoder gives
            assert all(torch.equal(a, b) for a, b in zip(targets, made[path], strict=True))


@pytest.mark.parametrize(
    ("kind", "capture"),
    [*((kind, "modules") for kind in ("llama", "tied", "gpt2", "t5")), rarely("t5", "whole")],
)
def test_scales_fold_into_what_comes_before(kind: str, capture: str, registered: Any) -> None:
    registered(Doubled)
    SCALED.clear()
    model, data = tiny(kind), batches(kind)
    config = replace(INT4, transforms=(Doubled(),))
    plain, scaled = (quantizer_of(qconfig=c, capture=capture) for c in (INT4, config))
    with pytest.raises(NotCalibrated, match="doubled works on blocks of the model: run"):
        scaled.quantize(model, example_inputs=data[0])
    scaled.round_weights(model, data, progress=False)
    ours = scaled.quantize(model)
    theirs = plain.quantize(model, example_inputs=data[0])
    assert torch.equal(ours(**data[0]).logits, theirs(**data[0]).logits)
    tails = {name.split(".", 3)[-1] for name in SCALED}
    wanted = {
        "llama": {"self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj", "lm_head"},
        "tied": {"self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"},
        "gpt2": {"attn.c_attn", "mlp.c_fc"},
    }
    if kind in wanted:
        assert tails == wanted[kind]
    assert scaled.state.rounded.scaled


def test_a_run_goes_on_where_it_was(tmp_path: Path, registered: Any) -> None:
    registered(Doubled)
    calls = []

    @registered
    @dataclass(frozen=True)
    class Breaks(RoundToNearest):
        name = "breaks"

        def round_block(self, block: Block, layers: Any) -> None:
            calls.append(block.path)
            if calls.count("model.layers.1") == 1 and block.path == "model.layers.1":
                raise KeyboardInterrupt
            super().round_block(block, layers)

    model, data = tiny("llama"), batches("llama")
    config = replace(INT4, method=Breaks(), transforms=(Doubled(),))
    quantizer, other = quantizer_of(qconfig=config), quantizer_of(qconfig=config)
    with pytest.raises(KeyboardInterrupt):
        quantizer.round_weights(model, data, folder=tmp_path / "run", progress=False)
    assert not quantizer.state.rounded
    quantizer.round_weights(model, data, folder=tmp_path / "run", progress=False)
    assert calls == ["model.layers.0", "model.layers.1", "model.layers.1", ""]
    other.round_weights(model, data, progress=False)
    ours, theirs = quantizer.quantize(model), other.quantize(model)
    assert torch.equal(ours(**data[0]).logits, theirs(**data[0]).logits)
    for wrong, what in (
        (lambda: quantizer.round_weights(model, data[:2], folder=tmp_path / "run"), "batches"),
        (
            lambda: quantizer_of().round_weights(model, data, folder=tmp_path / "run"),
            "settings",
        ),
        (
            lambda: quantizer_of(qconfig=config).round_weights(
                _changed(model), data, folder=tmp_path / "run"
            ),
            "weights",
        ),
    ):
        with pytest.raises(InvalidConfig, match=f"made with other {what}: give another folder"):
            wrong()


def _changed(model: nn.Module) -> nn.Module:
    other = tiny("llama")
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        next(iter(other.model.layers)).mlp.up_proj.weight[0, 0] += 1  # type: ignore[union-attr]
    return other


def test_what_is_saved_comes_back(tmp_path: Path, registered: Any) -> None:
    registered(Doubled)
    model, data = tiny("gpt2"), batches("gpt2")
    quantizer = quantizer_of(qconfig=replace(INT4, transforms=(Doubled(),)))
    quantizer.round_weights(model, data, progress=False)
    quant_model = quantizer.quantize(model)
    expected = quant_model(**data[0]).logits
    quantizer.save(tmp_path / "quantizer")
    again = Quantizer.load(tmp_path / "quantizer")
    assert torch.equal(again.quantize(model, example_inputs=data[0])(**data[0]).logits, expected)
    save(quant_model, tmp_path / "model")
    loaded = load(tmp_path / "model", model=tiny("gpt2"))
    assert torch.equal(loaded(**data[0]).logits, expected)
    fresh = quantizer_of(qconfig=replace(INT4, transforms=(Doubled(),)))
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh.quantize(model, example_inputs=data[0])(**data[0]).logits, expected)


def test_what_changed_since_is_told(registered: Any) -> None:
    registered(Doubled)
    model, data = tiny("llama"), batches("llama")
    quantizer = quantizer_of(qconfig=replace(INT4, transforms=(Doubled(),)))
    quantizer.round_weights(model, data, progress=False)
    amp_model = quantizer.amp(model)  # it measures weights that are rounded to nearest
    amp_model(**data[0], use_cache=False)
    assert len(quantizer.sensitivity(amp_model)) > 10
    quantizer.set("model.layers.0.mlp.up_proj", recipes.int8_weight_only())
    with pytest.raises(InvalidConfig, match=r"was rounded to s4 .* run quantizer\.round_weights"):
        quantizer.quantize(model)
    quantizer.set("model.layers.0.mlp.up_proj", None)  # it stays in float, scaled
    quant_model = quantizer.quantize(model)
    assert quant_model.quantization.plan["model.layers.0.mlp.up_proj"].quantized is False
    assert sqnr(model(**data[0]).logits, quant_model(**data[0]).logits) > 8  # a tiny random model
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[0, 0] += 1.0
    with pytest.raises(InvalidConfig, match="gate_proj has changed since it was rounded"):
        quantizer.quantize(model)


def test_mistakes(registered: Any) -> None:
    registered(Doubled)
    model, data = tiny("llama"), batches("llama")
    with pytest.raises(InvalidConfig, match="got no batches"):
        quantizer_of().round_weights(model, [])
    everything = quantizer_of(overrides={"op:linear": None})
    with pytest.raises(InvalidConfig, match=r"no weight of a linear layer.*: left in float by an"):
        everything.round_weights(model, data)
    static = QConfig(transforms=(Doubled(),))
    with pytest.raises(InvalidConfig, match="serves float and dynamic activations only"):
        quantizer_of(qconfig=static).round_weights(model, data)
    smooth = replace(INT4, transforms=(SmoothQuant(0.5),))
    with pytest.raises(InvalidConfig, match=r"smoothquant.* changes the weight when the model is"):
        quantizer_of(qconfig=smooth).round_weights(model, data)
    state = quantizer_of()
    state.round_weights(model, data, progress=False)
    saved = state.state_dict()
    saved["state"]["rounded"]["sites"]["lm_head"]["codes"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(InvalidConfig, match="rounded weight of 'lm_head': 3 values hold no s4"):
        quantizer_of().load_state_dict(saved)


class Mixed(nn.Module):
    """Blocks that do not feed each other, one that is called twice, and one with no data."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(2)
        )
        self.shared = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        both = self.towers[0](x) + self.towers[1](x)
        both = self.shared(torch.relu(self.shared(both)))
        return self.unused(both) if bool(x.sum() > 1e9) else both


def test_a_model_without_blocks_is_one() -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(8, 16)
    quantizer = quantizer_of()
    report = quantizer.round_weights(model, [x, 2 * x], progress=False)
    assert [block.path for block in report.blocks] == [""]
    plain = quantizer_of().quantize(model, example_inputs=x)
    assert torch.equal(quantizer.quantize(model)(x), plain(x))


def test_layers_that_read_one_tensor(registered: Any) -> None:
    found: list[list[str]] = []

    @registered
    @dataclass(frozen=True)
    class Groups(RoundToNearest):
        name = "groups"

        def round_block(self, block: Block, layers: Any) -> None:
            found.extend([x.path for x in each.layers] for each in block.reading(layers))
            super().round_block(block, layers)

    quantizer = quantizer_of(qconfig=replace(INT4, method=Groups()))
    quantizer.round_weights(tiny("llama"), batches("llama"), progress=False)
    block = [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert found == [*block, *block, ["lm_head"]]


@pytest.mark.parametrize(("kind", "recorded"), [("llama", 2), ("t5", 3 * 2)])
def test_blocks_that_are_called_alike_are_recorded_once(
    kind: str, recorded: int, monkeypatch: Any
) -> None:
    """Of later batches only what comes before the first block runs; T5 hands a bias on."""
    ran: list[str] = []
    real = chains.Recorder.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = real(self, *args, **kwargs)
        ran.append("block")
        return found

    monkeypatch.setattr(chains.Recorder, "forward", forward)
    model, given = tiny(kind), batches(kind)
    if kind == "t5":  # one chain is enough
        model, given = model.encoder, [{"input_ids": each["input_ids"]} for each in given]
    quantizer = quantizer_of()
    quantizer.round_weights(model, given, progress=False)
    assert len(ran) == recorded


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_a_head_that_needs_no_data_is_rounded_later(kind: str) -> None:
    """Its float weight is large, and a rounded one beside it would be as large."""
    int8 = recipes.int8_weight_only()
    model, data = tiny(kind), batches(kind)
    overrides = dict.fromkeys(("op:embedding", "lm_head"), int8)
    quantizer = quantizer_of(qconfig=replace(INT4, method=GPTQ()), overrides=overrides)
    report = quantizer.round_weights(model, data, progress=False)
    assert not any("lm_head" in block.sites for block in report.blocks)
    ours = quantizer.quantize(model)
    theirs = quantizer_of(qconfig=int8).quantize(model, example_inputs=data[0])
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    assert torch.equal(ours.model.embed_tokens.weight, theirs.model.embed_tokens.weight)
