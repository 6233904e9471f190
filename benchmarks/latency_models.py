"""The models whose latency is measured, each with the inputs of its calls.

All but all-MiniLM-L6-v2 and EfficientNet-Lite0 are transformers' architectures, or PyTorch's LSTM,
with random weights: latency does not depend on them, errors at the outputs do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import minilm, minilm_inputs
from torch import Tensor, nn

__all__ = ["MODELS", "Case", "Inputs", "resnet50"]

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Args:
        make: gives the model, in eval mode.
        sizes: gives the inputs of a call, and those of a call of another size.
        kind: ``"transformer"``, ``"cnn"`` or ``"recurrent"``, which other tools want to know.
    """

    make: Callable[[], nn.Module]
    sizes: Callable[[], list[Inputs]]
    kind: str = "transformer"


class FirstOnly(nn.Module):
    """The first output alone, as the exporters and every runtime can have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"output": self.model(x)[0]}


def _of(name: str, **settings: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    model, config = getattr(transformers, f"{name}Model"), getattr(transformers, f"{name}Config")
    made: nn.Module = model(config(**settings)).eval()
    return _with_statistics(made)


def _with_statistics(model: nn.Module) -> nn.Module:
    """Batch norms as training leaves them: not the identity, which would be folded away."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def resnet50() -> nn.Module:
    """Of transformers, with random weights."""
    return _of("ResNet")


def _whisper() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.WhisperConfig()  # that of whisper-tiny
    model = transformers.WhisperModel(config).eval()
    return model.get_encoder()  # type: ignore[no-any-return]


def _lstm() -> nn.Module:
    torch.manual_seed(0)
    return FirstOnly(nn.LSTM(512, 512, 2, batch_first=True)).eval()


def _efficientnet() -> nn.Module:
    from efficientnet import OUT, network

    return network(OUT / "vision-packages")


def _tokens(*sizes: tuple[int, int]) -> Callable[[], list[Inputs]]:
    return lambda: [minilm_inputs(*size) for size in sizes]


def _random(name: str, *sizes: tuple[int, ...]) -> Callable[[], list[Inputs]]:
    generator = torch.Generator().manual_seed(0)
    return lambda: [{name: torch.randn(size, generator=generator)} for size in sizes]


def _images(batch: int = 1, side: int = 224, name: str = "pixel_values") -> Any:
    return _random(name, (batch, 3, side, side), (batch + 1, 3, side, side))


MODELS = {
    "MiniLM-L6, 8 x 128": Case(minilm, _tokens((8, 128), (3, 96))),
    "MiniLM-L6, 1 x 32": Case(minilm, _tokens((1, 32), (1, 17))),
    "BERT-base, 1 x 384": Case(lambda: _of("Bert"), _tokens((1, 384), (2, 96))),
    "ViT-B/16, 1": Case(lambda: _of("ViT"), _images()),
    "Swin-T, 1": Case(lambda: _of("Swin"), _images()),
    "ConvNeXt-T, 1": Case(lambda: _of("ConvNext"), _images(), "cnn"),
    "ResNet-50, 1": Case(resnet50, _images(), "cnn"),
    "ResNet-50, 8": Case(resnet50, _images(8), "cnn"),
    "MobileNetV2, 1": Case(lambda: _of("MobileNetV2"), _images(), "cnn"),
    "EfficientNet-Lite0, 1": Case(_efficientnet, _images(name="inputs"), "cnn"),
    "Whisper-tiny's encoder, 1": Case(
        _whisper, _random("input_features", (1, 80, 3000), (2, 80, 3000))
    ),
    "LSTM, 2 x 512, 1 x 100": Case(_lstm, _random("x", (1, 100, 512), (1, 60, 512)), "recurrent"),
    "LSTM, 2 x 512, 8 x 100": Case(_lstm, _random("x", (8, 100, 512), (3, 60, 512)), "recurrent"),
}
