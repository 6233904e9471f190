"""Decoders in pieces: code that is one kernel call, and layers that are called at once."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import tokens
from thinning import rarely
from torch import Tensor, nn

import torch_quant
from torch_quant import Quantizer, native, recipes
from torch_quant.convert import quantized as module
from torch_quant.convert.joint import Member
from torch_quant.convert.quick import QuickCall
from torch_quant.native.joint import GATED_LINEAR
from torch_quant.native.rms_norm import RMS_NORM

pytestmark = [
    pytest.mark.sparse,
    pytest.mark.skipif(native.unavailable() is not None, reason="the kernels are missing"),
]

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "llama": ("Llama", {}, 7, 6),
    "gemma": ("Gemma", {"head_dim": 16}, 7, 6),
    "qwen3": ("Qwen3", {"head_dim": 32}, 11, 6),
    "olmo2": ("Olmo2", {}, 11, 6),
    "phi": ("Phi", {"hidden_act": "gelu"}, 2, 6),
    "stablelm": ("StableLm", {}, 2, 6),
    "gpt_neox": ("GPTNeoX", {"hidden_act": "gelu"}, 2, 0),
}
"""Name -> class, settings, norms and blocks that are one call, layers that are called at once.

Those of Gemma add 1 to their weights, those of OLMo 2 stand behind the layers and, as in Qwen 3, on
queries and keys. Phi has layer norms, attention beside the block, and two layers in that; StableLM
has layer norms; GPT-NeoX computes query, key and value as one.
"""


def decoder(name: str, **settings: Any) -> nn.Module:
    prefix, more, *_ = FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **more, **settings)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0).add_(0.01)  # its own are so small that nothing depends on them
    return model.requires_grad_(False)


def quantized(model: nn.Module) -> Any:
    quantizer = Quantizer(recipes.int4_weight_only(group_size=32), backend="onednn")
    return quantizer.quantize(model, example_inputs={"input_ids": tokens(1, 4, 64)})


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """First calls are seen by nobody."""
    seen, module.first_call = module.first_call, lambda glue: contextlib.nullcontext()
    try:
        yield
    finally:
        module.first_call = seen


def plain(model: nn.Module) -> Any:
    made = quantized(model)
    with one_by_one():
        made(input_ids=tokens(1, 4, 64))
    assert not quick_in(made)
    return made


def quick_in(model: Any) -> list[QuickCall]:
    glue = model.quantization.glue
    found = (vars(each).get("_compiled_call_impl") for each in glue.modules())
    return [each for each in found if isinstance(each, QuickCall) and not each._left]


def members_in(model: Any) -> list[Member]:
    parts = (getattr(each, "quantization", None) for each in model.quantization.glue.modules())
    return [how.joint for how in parts if how is not None and how.joint is not None]


def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits  # type: ignore[no-any-return]


def near(x: Tensor, y: Tensor) -> bool:
    """Codes of activations move where a float differs in its last bits: by some 1e-7 in most
    calls, up to 1e-2 in these small models, whose embeddings moved by 3e-7 do as much."""
    return bool((x - y).norm() <= 3e-2 * y.norm())


@contextlib.contextmanager
def kernels_called() -> Iterator[list[str]]:
    """Names of functions of the library that ran."""
    library, names = native.library.kernels(), []

    class Listening:
        def __getattr__(self, name: str) -> Any:
            names.append(name.removeprefix("torch_quant_"))
            return getattr(library, name)

    before, native.library.kernels = native.library.kernels, lambda: Listening()  # type: ignore[assignment,return-value]
    try:
        yield names
    finally:
        native.library.kernels = before


@pytest.mark.parametrize("name", FAMILIES)
def test_it_writes_what_layers_one_by_one_write(name: str) -> None:
    model = decoder(name)
    quick, slow = quantized(model), plain(model)
    for ids in (tokens(1, 6, 64), tokens(2, 5, 64), tokens(1, 1, 64)):
        for _ in range(2):
            assert near(logits(quick, ids), logits(slow, ids))
    *_, forwards, layers = FAMILIES[name]
    assert len(quick_in(quick)) == forwards
    learned = [each for each in quick_in(quick) if each._function is not None]
    assert len(learned) == forwards
    assert len(members_in(quick)) == layers
    options = {"max_new_tokens": 10, "do_sample": False}
    ids = tokens(1, 6, 64)
    assert torch.equal(quick.generate(ids, **options), slow.generate(ids, **options))


def test_a_token_takes_few_calls() -> None:
    model = quantized(decoder("llama"))
    ids = tokens(1, 3, 64)
    logits(model, ids)
    with kernels_called() as names:
        logits(model, ids)
    layer = ["rms_norm", "linears", "linear", "rms_norm", "gated"]
    assert names == [*layer, *layer, "rms_norm", "linear"]


def test_hooks_see_every_layer_inside() -> None:
    model = quantized(decoder("llama"))
    ids = tokens(1, 3, 64)
    wanted = logits(model, ids)
    seen: list[str] = []
    handles = [
        each.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, each in model.named_modules()
        if name.endswith(("_proj", "act_fn", "norm"))
    ]
    assert near(logits(model, ids), wanted)
    assert sum("mlp" in name for name in seen) == 8
    assert sum("self_attn" in name for name in seen) == 8
    assert sum("norm" in name for name in seen) == 5
    for handle in handles:
        handle.remove()
    with kernels_called() as names:
        assert torch.equal(logits(model, ids), wanted) or near(logits(model, ids), wanted)
    assert "gated" in names
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(""))
    seen.clear()
    logits(model, ids)
    everywhere.remove()
    assert len(seen) > 20


def test_a_hook_that_changes_a_result_is_obeyed() -> None:
    model = quantized(decoder("llama"))
    ids = tokens(1, 3, 64)
    before = logits(model, ids)
    layer = model.model.layers[0]
    for part in (layer.mlp.up_proj, layer.self_attn.k_proj):
        handle = part.register_forward_hook(lambda module, args, y: 9.0 - 9.0 * y)
        assert not near(logits(model, ids), before)
        handle.remove()
        assert near(logits(model, ids), before)


def test_what_the_code_depends_on_may_change() -> None:
    model, other = quantized(decoder("llama")), plain(decoder("llama"))
    ids = tokens(1, 3, 64)
    for _ in range(2):
        before = logits(model, ids)
    for each in (model, other):
        each.model.layers[0].input_layernorm.variance_epsilon = 3.0
    assert not near(logits(model, ids), before)
    assert near(logits(model, ids), logits(other, ids))
    for each in (model, other):
        each.model.layers[1].mlp.act_fn = nn.Tanh()
    assert near(logits(model, ids), logits(other, ids))
    for each in (model, other):
        each.model.norm.weight.data.mul_(-1.0)
    assert near(logits(model, ids), logits(other, ids))


def test_other_types_and_gradients_take_the_code_itself() -> None:
    model = quantized(decoder("llama"))
    logits(model, tokens(1, 3, 64))
    norm, x = model.model.norm, torch.randn(2, 64)
    assert isinstance(vars(norm)["_compiled_call_impl"], QuickCall)
    assert norm(x.bfloat16()).dtype is torch.float32  # its weight is
    with torch.enable_grad():
        norm(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    x = x.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert norm(x).dtype is torch.float32
    with pytest.raises(RuntimeError, match="must match the size"):
        norm(torch.randn(2, 63))


COPIES: dict[str, Callable[[Any, Path], Any]] = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "twice": lambda model, _: copy.deepcopy(pickle.loads(pickle.dumps(model))),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("called", [True, False])
def test_copies_are_quick_by_themselves(way: str, called: bool, tmp_path: Path) -> None:
    model = quantized(decoder("llama"))
    ids = tokens(1, 3, 64)
    if called:
        logits(model, ids)
    made = COPIES[way](model, tmp_path)
    for _ in range(2):
        assert near(logits(made, ids), logits(model, ids))
    assert len(quick_in(made)) == 7
    assert len(members_in(made)) == 6
    theirs = {id(each.module) for each in quick_in(model)}
    assert not theirs & {id(each.module) for each in quick_in(made)}
    with torch.no_grad():
        for each in made.parameters():
            each.zero_()
    assert not near(logits(made, ids), logits(model, ids))


def test_a_shallow_copy_runs_its_own_code() -> None:
    model = quantized(decoder("llama"))
    for _ in range(2):
        logits(model, tokens(1, 3, 64))
    norm, x = model.model.norm, torch.randn(2, 64)
    wanted = norm(x)
    other = copy.copy(norm)
    assert torch.equal(other(x), type(norm).forward(norm, x))
    other.variance_epsilon = 3.0
    assert torch.equal(other(x), type(norm).forward(other, x))
    assert not near(other(x), wanted)
    assert torch.equal(norm(x), wanted)
    model.model.norm = other  # in the place of the first
    changed = plain(decoder("llama"))
    changed.model.norm.variance_epsilon = 3.0
    ids = tokens(1, 3, 64)
    assert near(logits(model, ids), logits(changed, ids))


def test_backward_hooks_are_called() -> None:
    model = quantized(decoder("llama"))
    for _ in range(2):
        logits(model, tokens(1, 3, 64))
    norm, seen = model.model.norm, []
    handle = norm.register_full_backward_hook(lambda *_: seen.append(1))
    with torch.enable_grad():
        norm(torch.randn(2, 64, requires_grad=True)).sum().backward()
    handle.remove()
    assert seen == [1]


def test_saved_and_loaded(tmp_path: Path) -> None:
    float_model = decoder("llama")
    model = quantized(float_model)
    ids = tokens(1, 3, 64)
    before = dict(model.state_dict())
    wanted = logits(model, ids)
    assert model.state_dict().keys() == before.keys()
    torch_quant.save(model, tmp_path / "model")
    found = torch_quant.load(tmp_path / "model", model=decoder("llama"))
    for _ in range(2):
        assert near(logits(found, ids), wanted)
    assert len(quick_in(found)) == 7
    found.load_state_dict(model.state_dict())
    assert near(logits(found, ids), wanted)


@pytest.mark.parametrize("called", [True, rarely(False)])
def test_compiled(called: bool) -> None:
    model = quantized(decoder("llama"))
    ids = tokens(1, 3, 64)
    if called:
        logits(model, ids)
    step = torch.compile(model, fullgraph=True, backend="eager")
    assert near(step(input_ids=ids, use_cache=False).logits, logits(model, ids))


def test_inference_mode() -> None:
    model = quantized(decoder("llama"))
    ids = tokens(1, 3, 64)
    with torch.inference_mode():
        first, second = logits(model, ids), logits(model, ids)
    assert near(first, second)
    with torch.no_grad():
        assert near(logits(model, ids), first)
        assert len(quick_in(model)) == 7


def test_threads() -> None:
    model = quantized(decoder("llama"))
    batches = [tokens(1, 3 + i, 64) for i in range(4)]
    wanted = [logits(model, each) for each in batches]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(logits(model, batches[i]), wanted[i]):
                wrong.append(i)

    wanted = [logits(model, each) for each in batches]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


class Pairs(nn.Module):
    """Two layers of one input, between whose calls something may happen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 16)
        self.between: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.a(x)
        if self.between is not None:
            x = self.between(x)
        return y + self.b(x)  # type: ignore[no-any-return]


def pairs() -> tuple[Any, Any, Tensor]:
    """The quantized model, the same whose layers are called one by one, and an input."""
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    made = []
    for _ in range(2):
        quantizer = Quantizer(recipes.int4_weight_only(group_size=32), backend="onednn")
        made.append(quantizer.quantize(Pairs().eval(), example_inputs=x))
    quick, slow = made
    quick(x)
    with one_by_one():
        slow(x)
    assert len(members_in(quick)) == 2
    assert torch.equal(quick(x), slow(x))
    return quick, slow, x


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "in place": lambda x: x.add_(1.0),
    "through a view": lambda x: (x.view(-1).mul_(2.0), x)[1],
    "another tensor": lambda x: x + 1.0,
    "an equal one": lambda x: x.clone(),
    "a view": lambda x: x[:1],
}


@pytest.mark.parametrize("name", BETWEEN)
@torch.no_grad()
def test_a_result_is_of_the_tensor_as_it_is(name: str) -> None:
    quick, slow, x = pairs()
    for _ in range(8):
        for each in (quick, slow):
            vars(each.quantization.glue)["between"] = BETWEEN[name]
        assert torch.equal(quick(x), slow(x))
        for each in (quick, slow):
            vars(each.quantization.glue)["between"] = None
        assert torch.equal(quick(x), slow(x))


@torch.no_grad()
def test_layers_called_alone() -> None:
    quick, slow, x = pairs()
    for _ in range(8):
        for name in ("a", "b", "b", "a"):
            assert torch.equal(getattr(quick, name)(x), getattr(slow, name)(x))
    assert torch.equal(quick(x), slow(x))
    with kernels_called() as names:
        for _ in range(8):
            assert torch.equal(quick.a(x), slow.a(x))
    assert names[-6:] == ["linear"] * 6  # what nobody reads is made no more
    assert torch.equal(quick(x), slow(x))


@torch.no_grad()
def test_calls_that_were_interrupted_do_not_end_it() -> None:
    quick, slow, x = pairs()

    def interrupt(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    for times, rest in ((5, 16), (2, 32)):  # the second time one call in vain is enough
        vars(quick.quantization.glue)["between"] = interrupt
        for _ in range(times):
            with pytest.raises(KeyboardInterrupt):
                quick(x)
        (group,) = {each.group for each in members_in(quick)}
        assert group.waiting is None  # nothing is held meanwhile
        assert group.resting == rest
        if rest == 16:
            for _ in range(rest):
                with pytest.raises(KeyboardInterrupt):
                    quick(x)
    vars(quick.quantization.glue)["between"] = None
    for _ in range(32):
        with kernels_called() as names:
            assert torch.equal(quick(x), slow(x))
        assert "linears" not in names
    for _ in range(2):
        with kernels_called() as names:
            assert torch.equal(quick(x), slow(x))
        assert names.count("linears") == 1
    assert group.rest == 16
    assert group.unread == 0


def test_nothing_is_held_when_all_was_read() -> None:
    quick, _, x = pairs()
    quick(x)
    (group,) = {each.group for each in members_in(quick)}
    assert group.waiting is None


def test_other_backends_run_their_own() -> None:
    quantizer = Quantizer(recipes.int4_weight_only(group_size=32), backend="reference")
    ids = tokens(1, 4, 64)
    model = quantizer.quantize(decoder("llama"), example_inputs={"input_ids": ids})
    logits(model, ids)
    assert not quick_in(model)
    assert not members_in(model)


def test_operators_are_seen_by_a_profiler() -> None:
    model = quantized(decoder("llama"))
    ids = tokens(1, 3, 64)
    logits(model, ids)
    with torch.profiler.profile() as profile:
        logits(model, ids)
    names = {event.key for event in profile.key_averages()}
    assert {"torch_quant::weight_only_linear", "aten::rsqrt"} <= names
    assert not names & {str(op._schema.name) for op in (RMS_NORM, GATED_LINEAR)}
