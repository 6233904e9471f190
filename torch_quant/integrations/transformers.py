"""transformers: ``from_pretrained`` and ``save_pretrained`` of weight-only quantized models.

Importing this file registers the method ``"torch_quant"``. Then a float model is quantized as it is
loaded, by ``quantization_config=TorchQuantConfig(...)``, and a folder that ``save_pretrained`` or
``export_checkpoint(format="torch_quant")`` wrote is loaded with its integers.

Linear layers are replaced in the model that transformers has made; all around them stays its own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from torch_quant.checkpoints.compressed_tensors import OWN
from torch_quant.checkpoints.loading import example_of, quantized_from
from torch_quant.checkpoints.skeletons import placeholder
from torch_quant.checkpoints.stored import Checkpoint, opened
from torch_quant.config import OverrideKey, QConfig
from torch_quant.convert.codes import QuantizedWeight, weights_of
from torch_quant.convert.joint import prepare
from torch_quant.convert.quantized import QuantizedModule
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import InvalidConfig
from torch_quant.graph.twin import twin_of
from torch_quant.nn.stand_in import class_of
from torch_quant.quantizer import Quantizer

__all__ = ["TorchQuantConfig", "TorchQuantHfQuantizer"]

_LAYOUT = ("config_groups", "format", "ignore", "kv_cache_scheme", "quantization_status",
           "global_compression_ratio")  # fmt: skip
"""What says in a saved configuration how weights are stored."""

logger = logging.getLogger("torch_quant")


@register_quantization_config(OWN.name)
class TorchQuantConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes a float model.

    Args:
        recipe: the name of one of ``torch_quant.recipes`` that quantizes weights alone.
        backend: where the model runs; the best of this machine by default.
        modules_to_not_convert: names or patterns of what stays in float, as ``["lm_head",
            "*.experts*"]``; embeddings do.
        options: of the recipe, as ``group_size=64``.

    Raises:
        InvalidConfig: an unknown recipe or option, or one that needs calibration data.

    >>> TorchQuantConfig("int4_weight_only", group_size=64).qconfig.weight.granularity
    PerGroup(size=64, axis=None)
    """

    def __init__(
        self,
        recipe: str | None = None,
        *,
        backend: str | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        quant_method: str = OWN.name,
        **options: Any,
    ) -> None:
        self.quant_method: Any = OWN.name
        self.recipe, self.backend = recipe, backend
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.layout = {key: options.pop(key) for key in _LAYOUT if key in options}
        self.options = options
        if recipe is not None or not self.layout:
            self._check(self.qconfig)

    @property
    def qconfig(self) -> QConfig:
        """What the recipe gives."""
        return QConfig.from_dict({"recipe": self.recipe or "int4_weight_only", **self.options})

    def _check(self, qconfig: QConfig) -> None:
        method = qconfig.method
        if qconfig.needs_ranges or (method is not None and method.wants_statistics):
            raise InvalidConfig(
                f"TorchQuantConfig({self.recipe!r}) needs calibration data: quantize with "
                "torch_quant.Quantizer, then torch_quant.export_checkpoint(..., "
                f"format={OWN.name!r}) writes what from_pretrained loads"
            )

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        return {
            "quant_method": self.quant_method,
            "recipe": self.recipe,
            "backend": self.backend,
            "modules_to_not_convert": self.modules_to_not_convert,
            **self.options,
            **self.layout,
        }


class _Awaited(nn.Module):
    """In the place of a linear layer while its checkpoint is loaded: it has only the bias."""

    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        self.sizes = module.in_features, module.out_features
        self.bias = module.bias


@register_quantizer(OWN.name)
class TorchQuantHfQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves."""

    requires_calibration = False
    quantization_config: TorchQuantConfig

    def __init__(self, quantization_config: TorchQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan = QuantPlan()
        self._checkpoint: Checkpoint | None = None

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Layers that are not quantized compute in float32."""
        if dtype not in (None, torch.float32):
            logger.info("the model is loaded in float32, not %s", dtype)
        return torch.float32

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        if not checkpoint_files:
            raise InvalidConfig("a quantized model is loaded from a folder, not from a state_dict")
        self._checkpoint = opened(Path(checkpoint_files[0]).parent)
        known = dict(model.named_modules())
        ignored = []
        for name, stored in self._checkpoint.stored.items():
            module = known.get(name)
            if not isinstance(module, nn.Linear):
                raise InvalidConfig(
                    f"{self._checkpoint.files.folder} holds a quantized weight of {name}, which "
                    f"is no linear layer of the {type(model).__name__}"
                )
            _put(model, name, _Awaited(module))
            ignored += [f"^{re.escape(each)}$" for each in stored.tensors]
        before = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        model._keys_to_ignore_on_load_unexpected = {*before, *ignored}  # type: ignore[assignment]

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        if self._checkpoint is not None:
            for name, module in list(model.named_modules()):
                if isinstance(module, _Awaited):
                    _put(model, name, _linear(module))
            skeleton, example = twin_of(model), example_of(model)
            made = quantized_from(self._checkpoint, skeleton, config.backend, example)
            for name in self._checkpoint.stored:  # the backend may have had some dequantized
                module = model.get_submodule(name)
                module._parameters["weight"] = skeleton.get_submodule(name)._parameters["weight"]
            self._checkpoint = None  # open files, which a copy could not have
        else:
            made = _by_recipe(model, config)
        self.plan = made.quantization.plan
        _adopt(model, made, self.plan)
        prepare(model)
        weights = self._weights(model)
        if any(not _is_tied_apart(model, name) for name in weights):
            settings: Any = model.config
            for each in (settings, settings.get_text_config()):
                each.tie_word_embeddings = False
        if all(not OWN.refusal(weight) for weight in weights.values()):
            in_float = [
                name
                for name, module in model.named_modules()
                if issubclass(class_of(module), nn.Linear) and name not in weights
            ]
            config.layout = {
                key: value for key, value in OWN.config(weights, in_float).items() if key in _LAYOUT
            }

    def _weights(self, model: nn.Module) -> dict[str, QuantizedWeight]:
        return weights_of(model, self.plan)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], Any]:
        """The integers packed, and all else as it is.

        Raises:
            InvalidConfig: a layer that the layout does not hold.
        """
        weights = self._weights(model)
        for name, weight in weights.items():
            if reason := OWN.refusal(weight):
                raise InvalidConfig(
                    f"{name} cannot be saved: {reason}. Leave it in float: "
                    f"TorchQuantConfig(..., modules_to_not_convert=[{weight.site!r}])"
                )
        integers = {name for each in weights.values() for name in each.names}
        found = {name: x for name, x in model.state_dict().items() if name not in integers}
        for name, weight in weights.items():
            tensors = OWN.tensors(weight, torch.float32)
            found |= {f"{name}.{ending}": x for ending, x in tensors.items()}
        return found, {}

    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No."""
        return False


def _by_recipe(model: nn.Module, config: TorchQuantConfig) -> QuantizedModule:
    overrides: dict[OverrideKey, QConfig | None] = {"op:embedding": None}
    overrides |= dict.fromkeys(config.modules_to_not_convert)
    quantizer = Quantizer(
        config.backend, qconfig=config.qconfig, overrides=overrides, capture="modules"
    )
    twin, example = twin_of(model), example_of(model)
    made = quantizer.quantize(twin, example_inputs=example, share_float_weights=True)
    left = [
        site
        for site in made.quantization.plan.values()
        if site.op == "linear" and not site.quantized and "left in float by" not in site.reason
    ]
    if left:
        names = ", ".join(site.name for site in left[:3]) + (" ..." if left[3:] else "")
        logger.warning("%d linear layers stay in float (%s): %s", len(left), names, left[0].reason)
    return made


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def _linear(awaited: _Awaited) -> nn.Linear:
    inputs, outputs = awaited.sizes
    made = nn.Linear(inputs, outputs, bias=False, device="meta")
    made._parameters["weight"] = placeholder((outputs, inputs))
    made._parameters["bias"] = awaited.bias
    return made.eval()


def _adopt(model: nn.Module, made: QuantizedModule, plan: QuantPlan) -> None:
    """Put the quantized modules into the model, in the place of its own."""
    quantized = {name.partition("@")[0] for name in plan.quantized}
    done: list[str] = []
    for path, module in made.named_modules(remove_duplicate=False):
        if not path or not isinstance(module, QuantizedModule) or not module.quantization.graphs:
            continue
        if any(path.startswith(f"{each}.") for each in done):
            continue
        if any(name == path or name.startswith(f"{path}.") for name in quantized):
            module.quantization.shared = None
            _put(model, path, module)
            done.append(path)


def _is_tied_apart(model: nn.Module, name: str) -> bool:
    """Whether a quantized layer was tied to no other; it is none any more."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    target = f"{name}.weight"
    if target not in tied and target not in tied.values():
        return True
    for key in [key for key, source in tied.items() if target in (key, source)]:
        del tied[key]
    return False
