"""Networks, configurations and a metric for tests of ``autotune``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import attention_explicit, mlp, normal, seeded, tiny_transformer, tokens
from torch import Tensor, nn

from torch_quant import (
    QConfig,
    QuantSpec,
    autotune,
    recipes,
)

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, lambda salt: normal(32, 16, salt=salt)),
    "attention": (attention_explicit, lambda salt: normal(24, 6, 16, salt=salt)),
    "transformer": (tiny_transformer, lambda salt: tokens(24 + salt)),
}


def bits(weight: int, activation: int | None = None) -> QConfig:
    spec = QuantSpec.of(bits=weight, signed=True, symmetric=True, per_channel=True)
    if activation is None:
        return recipes.weight_only(bits=weight, group_size=None)
    return QConfig(input=QuantSpec.of(bits=activation), weight=spec)


def many() -> dict[str, QConfig]:
    """24 configurations of about as many sizes."""
    return {
        f"{bits} bits, {group}, {'signed' if symmetric else 'affine'}": recipes.weight_only(
            bits=bits, group_size=group, symmetric=symmetric
        )
        for bits in (2, 4, 8)
        for group in (2, 4, 8, 16)
        for symmetric in (True, False)
    }


def agreement(model: nn.Module, x: Tensor) -> Callable[[nn.Module], float]:
    """The cosine of outputs with the float model's, centred: below 1 by the noise alone."""
    with torch.no_grad():
        expected = model(x)
    mean = expected.mean(0)

    def metric(candidate: nn.Module) -> float:
        with torch.no_grad():
            y = candidate(x)
        return float(torch.cosine_similarity(y - mean, expected - mean, dim=-1).mean())

    return metric


def tuned(name: str, configurations: Any, **options: Any) -> Any:
    build, inputs = NETWORKS[name]
    model = seeded(build)
    options = {"objective": "size", "backend": "reference", "progress": False, **options}
    metric = options.pop("eval_fn", None) or agreement(model, inputs(3))
    return autotune(model, configurations, [inputs(0), inputs(1)], metric, **options)


def finite(candidate: nn.Module) -> float:
    return float(candidate(normal(4, 16)).isfinite().all())
