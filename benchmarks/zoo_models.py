"""Small models of every architecture that an environment can build, and inputs for them.

No architecture is named here but in :data:`EXTRA`. A configuration's sizes are made small by what
its fields are called; inputs are made by what the arguments of ``forward`` are called, and of the
shapes that an argument may have, the first is taken with which the float model runs.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from zoo_images import families, settled, smallest, timm_candidates, torchvision_candidates

from torch_quant.graph.outputs import flatten_output

__all__ = ["Built", "NotBuilt", "architectures", "build", "missing", "tensors"]

LARGEST = 200_000_000
"""Parameters. What is larger with the smallest sizes that it takes is not built."""

LIBRARIES = {
    "transformers": "pip install -e '.[examples]'",
    "timm": "pip install torchvision timm, in an environment of its own: they want their own torch",
    "torchvision": "pip install torchvision, in an environment of its own: it wants its own torch",
}
"""Where architectures come from, and how to get it."""

HIDDEN = {
    "d_embed", "d_model", "decoder_hidden_size", "dim", "emb_dim", "embed_dim", "embedding_size",
    "encoder_hidden_dim", "hidden_dim", "hidden_dims", "hidden_size", "n_embd", "out_hidden_size",
    "output_hidden_size", "proj_size", "projection_dim", "text_hidden_size",
}  # fmt: skip
INNER = {"d_ff", "d_inner", "feed_forward_proj_dim", "n_inner"}
POSITIONS = {
    "max_seq_len", "max_source_positions", "max_target_positions", "n_positions", "seq_len",
    "sliding_window",
}  # fmt: skip
LAYERS = {"layers", "n_layer", "n_layers", "num_blocks", "depth"}
STAGES = {"depths", "layers", "num_blocks", "num_layers", "num_stages"}
WIDTHS = {"dims", "embed_dim", "embed_dims", "encoder_hidden_sizes", "hidden_sizes"}
TYPES = {"layer_types", "layers_block_type", "mlp_layer_types"}

Inputs = dict[str, Any]


class NotBuilt(Exception):
    """The environment cannot make this architecture small, or this program has no inputs for it."""


def missing() -> dict[str, str]:
    """Libraries of models that are not installed -> how to get them."""
    return {name: how for name, how in LIBRARIES.items() if importlib.util.find_spec(name) is None}


def architectures() -> dict[str, str]:
    """``library/architecture`` -> the class, or the module with the functions, that makes it."""
    found: dict[str, str] = {}
    absent = missing()
    if "transformers" not in absent:
        from transformers.models.auto import modeling_auto

        names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | modeling_auto.MODEL_MAPPING_NAMES
        for kind, name in names.items():
            found[f"transformers/{kind}"] = name if isinstance(name, str) else name[0]
    if "timm" not in absent:
        found |= families("timm")
    if "torchvision" not in absent:
        found |= families("torchvision")
    return dict(sorted(found.items()))


class Built(NamedTuple):
    """A small model with random weights, eval mode, and two inputs of different sizes for it."""

    model: nn.Module
    batches: list[Inputs]
    name: str
    """The class, or the function that made it."""


def build(name: str, made_by: str) -> Built:
    """The small model of an architecture.

    Args:
        name: a key of :func:`architectures`.
        made_by: its value.

    Raises:
        NotBuilt: says what went wrong.
    """
    library = name.partition("/")[0]
    torch.manual_seed(0)
    if library == "transformers":
        return _of_transformers(made_by)
    return _of_images(library, made_by)


def tensors(output: Any) -> list[Tensor]:
    """The tensors among a model's outputs, in order, those of caches included."""
    return [x for x in flatten_output(output)[0] if isinstance(x, Tensor)]


def _of_images(library: str, family: str) -> Built:
    """A model of timm or torchvision, with images of the size that it is made for."""
    try:
        model, name = smallest(library, family)
    except Exception as e:
        raise NotBuilt(_said(e)) from e
    if (count := sum(x.numel() for x in model.parameters())) > LARGEST:
        raise NotBuilt(f"{name}: {count / 1e6:.0f} million parameters")
    model = _lively(model)
    if library == "timm":
        candidates = timm_candidates(model)
    else:
        candidates = torchvision_candidates(model, family)
    batches = _that_run(model, list(candidates))
    settled(model, batches[0])
    return Built(model, batches, name)


def _of_transformers(name: str) -> Built:
    import transformers

    try:
        cls = getattr(transformers, name)
        config_class = cls.config_class
    except Exception as e:
        raise NotBuilt(_said(e)) from e
    reasons = []
    for change in (_every_size, _scalar_size, _but_heads, _layer_count):
        try:
            config = _shrunk(config_class(), change)
            with torch.device("meta"):
                count = sum(x.numel() for x in cls._from_config(config).parameters())
            if count > LARGEST:
                raise NotBuilt(f"{count / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            model = cls._from_config(config).eval().float()
            model = _lively(model)
            pairs = zip(_calls(model, 2, 12, 0), _calls(model, 3, 9, 1), strict=True)
            batches = _that_run(model, [list(pair) for pair in pairs])
            settled(model, batches[0])
            return Built(model, batches, name)
        except Exception as e:
            reasons.append(_said(e))
    raise NotBuilt(" | ".join(dict.fromkeys(reasons)))


def _lively(model: nn.Module) -> nn.Module:
    """The model, with weights of which signals do not vanish on their way.

    Deviations of 0.02 are made for a thousand inputs. With few, and without norms, outputs of 1e-20
    come of them, which no format of eight bits has.
    """
    with torch.no_grad():
        for name, x in model.named_parameters():
            fan = x[0].numel() if x.dim() > 1 else 0
            if fan and x.is_floating_point() and name.endswith("weight"):
                wanted, found = fan**-0.5, float(x.std()) if x.numel() > 1 else 0.0
                if 0.0 < found < wanted:
                    x.mul_(wanted / found)
    return model


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, NotBuilt) else f"{type(error).__name__}: {text[:150]}"


def _that_run(model: nn.Module, candidates: list[list[Inputs]]) -> list[Inputs]:
    """The first inputs with which the float model gives tensors, the same twice."""
    reasons = []
    for inputs in candidates:
        try:
            with torch.no_grad():
                for each in inputs:
                    outputs = tensors(model(**each))
                    if not any(x.is_floating_point() and x.numel() for x in outputs):
                        raise NotBuilt("gives no floating-point tensor")
            return inputs
        except Exception as e:
            reasons.append(_said(e))
    raise NotBuilt(next(iter(dict.fromkeys(reasons)), "no argument is known"))


Change = Callable[[str, Any], Any]
"""The smaller value of a field, by its name; None keeps it."""


def _shrunk(config: Any, change: Change, depth: int = 0) -> Any:
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            if depth < 3:
                _shrunk(value, change, depth + 1)
            continue
        if value is None and key == "prediction_length":
            new: Any = 4
        elif isinstance(value, bool) or value is None:
            continue
        else:
            new = change(key, value)
        if new is not None:
            try:
                setattr(config, key, new)
            except Exception:  # a field that others compute, or that is checked against them
                continue
    return config


def _layer_count(key: str, value: Any) -> Any:
    """Fewer layers and tokens; every width as it was."""
    if isinstance(value, int):
        if key in LAYERS or key.endswith(("layers", "n_layer", "num_blocks", "depth")):
            return min(value, 2)
        if "vocab_size" in key:
            return min(value, 160)
        if key.endswith(("_token_id", "_token_index", "_id", "token_ids")) and value >= 150:
            return 3 + zlib.crc32(key.encode()) % 100
    if isinstance(value, list) and key in TYPES:
        return value[:2]
    if _integers(value) and key in STAGES:
        return type(value)([1] * len(value))
    return None


def _scalar_size(key: str, value: Any) -> Any:
    """Besides, every width that is one number."""
    if (fewer := _layer_count(key, value)) is not None or not isinstance(value, int):
        return fewer
    if "key_value_heads" in key or key in ("kv_heads", "num_kv_heads"):
        return min(value, 2)
    if "head_dim" in key or key in ("attention_head_size", "d_kv"):
        return min(value, 8)
    if "heads" in key or key == "n_head":
        return min(value, 4)
    if "experts_per" in key or "top_k" in key:
        return min(value, 2)
    if "experts" in key:
        return min(value, 4)
    if key in HIDDEN or key == "image_size":
        return min(value, 32)
    if "intermediate" in key or "ffn" in key or key in INNER:
        return min(value, 64)
    if "max_position" in key or key in POSITIONS:
        return min(value, 64)
    if key == "patch_size":
        return min(value, 8)
    return min(value, 16) if "rank" in key else None


def _but_heads(key: str, value: Any) -> Any:
    """Heads keep their sizes, of which some are parts of others, and keys have as many."""
    if "head_dim" in key:
        return None
    heads = "key_value_heads" in key and isinstance(value, int)
    return min(value, 4) if heads else _scalar_size(key, value)


def _every_size(key: str, value: Any) -> Any:
    """Besides, widths that are lists of numbers, one for each stage."""
    if (fewer := _scalar_size(key, value)) is not None or not _integers(value):
        return fewer
    if key in WIDTHS:
        return type(value)([16 * (i + 1) for i in range(len(value))])
    if "heads" in key:
        return type(value)([min(x, 2) for x in value])
    return type(value)([32] * len(value)) if key == "image_size" else None


def _integers(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    )


PARTS = ("vision_config", "text_config", "audio_config", "backbone_config", "encoder")


def _field(config: Any, *names: str, default: Any) -> Any:
    """The first of these fields that the configuration, or a part of it, has."""
    for name in names:
        for part in (config, *(getattr(config, part, None) for part in PARTS)):
            if (value := getattr(part, name, None)) is not None:
                return value
    return default


def _calls(model: Any, batch: int, length: int, seed: int) -> Iterator[Inputs]:
    """Keywords of ``forward``, one dictionary for each choice of shapes."""
    takes = inspect.signature(model.forward).parameters
    config, main = model.config, model.main_input_name
    wanted = {
        key
        for key, each in takes.items()
        if each.default is inspect.Parameter.empty
        and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }
    others = {"pixel_values", "input_values", "input_features"}
    if main in takes:
        wanted.add(main)
    if "input_ids" in takes and main not in others:
        wanted.add("input_ids")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        wanted.add("decoder_input_ids")
    if "bbox" in takes and "input_ids" in wanted:
        wanted.add("bbox")
    make = _Arguments(config, batch, length, seed)
    more = {"pixel_values", "input_ids"} & set(takes) if main in ("input_ids", *others) else set()
    for names in dict.fromkeys((frozenset(wanted), frozenset(wanted | more))):
        shapes = [make.choices(name) for name in sorted(names)]
        for chosen in itertools.islice(itertools.product(*shapes), 12):
            call = dict(zip(sorted(names), chosen, strict=True))
            if "attention_mask" in takes and "input_ids" in call:
                call["attention_mask"] = torch.ones_like(call["input_ids"])
            if "use_cache" in takes:
                call["use_cache"] = False
            yield call


class _Arguments:
    """Tensors for an argument, by its name: the shapes that such arguments have."""

    def __init__(self, config: Any, batch: int, length: int, seed: int) -> None:
        self.config, self.batch, self.length = config, batch, length
        self.generator = torch.Generator().manual_seed(seed)

    def choices(self, name: str) -> list[Any]:
        config, b, n = self.config, self.batch, self.length
        hidden = _field(config, "hidden_size", "d_model", "embed_dim", default=32)
        mels = _field(config, "num_mel_bins", "input_feat_per_channel", "feature_size", default=80)
        if name.endswith("input_ids"):
            most = min(int(_field(config, "vocab_size", default=100)), 100)
            return [torch.randint(5, max(most, 8), (b, n), generator=self.generator)]
        if name == "bbox":
            low = torch.randint(0, 15, (b, n, 2), generator=self.generator)
            return [torch.cat([low, low + 8], -1)]
        if name.endswith("pixel_values") or name == "pixel_values_videos":
            return self._images()
        if name == "input_values":
            wave, frames = 3200 + 160 * n, _field(config, "max_length", default=1024)
            return self._normal((b, wave), (b, 1, wave), (b, frames, mels))
        if name == "input_features":
            frames = 2 * int(_field(config, "max_source_positions", default=64))
            return self._normal((b, mels, frames), (b, frames, mels), (b, 160 * n), (b, 1, 3200))
        if name == "hidden_states":
            patch = int(_field(config, "patch_size", default=8))
            deep = int(_field(config, "temporal_patch_size", default=1))
            flat = int(_field(config, "in_channels", "in_chans", default=3)) * deep * patch**2
            return self._normal((16 * b, flat), (b, n, hidden), (b, hidden, n))
        if name.endswith("grid_thw"):
            return [torch.tensor([[1, 4, 4]] * b)]
        if name == "past_values":
            wide = int(_field(config, "num_input_channels", "input_size", default=1))
            past = int(_field(config, "context_length", default=32))
            past += max(_field(config, "lags_sequence", default=[0]))
            return self._normal((b, past), (b, past, wide))
        if name == "inputs_embeds":
            return self._normal((b, n, hidden))
        raise NotBuilt(f"no inputs are known for the argument {name}")

    def _images(self) -> list[Tensor]:
        size = _field(self.config, "image_size", default=64)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = int(_field(self.config, "num_channels", "in_channels", default=3))
        frames = int(_field(self.config, "num_frames", "frames_per_clip", default=2))
        image = (channels, height, width)
        return self._normal(
            (self.batch, *image), (self.batch, frames, *image), (self.batch, channels, 64, 64)
        )

    def _normal(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        return [torch.randn(shape, generator=self.generator) for shape in shapes]
