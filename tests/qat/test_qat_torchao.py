"""torchao's fake-quantizer computes the same linear layer: outputs and gradients, to rounding.

Its scales are set to ours, since the two begin elsewhere. What it learns by automatic
differentiation is what LSQ says, before the paper's gradient scale. They differ for weights that
are beyond an end of the range by less than half a step: equation 2 of the paper passes them no
gradient, torchao does, since they round to the end.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torch_quant import FLOAT, QConfig, Quantizer, QuantSpec, recipes

qat = pytest.importorskip(
    "torchao.quantization.qat",
    reason="the peer is not installed: pip install -e .[peers]",
    exc_type=ImportError,
)

pytestmark = [
    pytest.mark.usefixtures("grad"),
    pytest.mark.filterwarnings("ignore"),  # of torchao about itself and its other extensions
]

IN, OUT = 64, 8


def gradients(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and gradients of the input and of the layer's weight."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, layer.weight.grad.clone()


def keep_off_ends(weight: Tensor, scale: Tensor, bits: int) -> None:
    """Move weights by a step where they are beyond an end by less than half of one."""
    step = scale.reshape(OUT, -1).repeat_interleave(IN // scale.reshape(OUT, -1).shape[1], 1)
    beyond = torch.maximum(weight / step - 2 ** (bits - 1) + 1, -(2 ** (bits - 1)) - weight / step)
    near = (beyond > 0) & (beyond < 0.51)
    weight -= torch.where(near, weight.sign() * step, 0.0)


@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_linear_layer(bits: int, group: int | None) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(IN, OUT).eval(), torch.randn(16, IN)
    theirs = qat.FakeQuantizedLinear(
        IN,
        OUT,
        bias=True,
        weight_config=qat.IntxFakeQuantizeConfig(
            getattr(torch, f"int{bits}"),
            "per_channel" if group is None else None,
            group_size=group,
            is_dynamic=False,
            range_learning=True,
        ),
    )
    channels = QuantSpec.of(bits=bits, signed=True, symmetric=True, per_channel=True)
    qconfig = (
        QConfig(input=FLOAT, weight=channels)
        if group is None
        else recipes.weight_only(bits=bits, group_size=group)
    )
    quantizer = Quantizer("reference", qconfig=qconfig)
    ours = quantizer.qat(linear, edge_bits=None, example_inputs=(x,))
    scale = next(each for name, each in ours.named_parameters() if name.endswith("_scale"))
    with torch.no_grad():
        scale *= 0.6  # some weights are outside
        keep_off_ends(linear.weight, scale, bits)
    theirs.load_state_dict(linear.state_dict())
    fake = theirs.weight_fake_quantizer
    fake.scale = nn.Parameter(scale.detach().reshape(OUT, -1).clone())
    fake.zero_point = torch.zeros_like(fake.scale)
    fake._initialized = True

    for one, two in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)
    highest = 2 ** (bits - 1) - 1
    factor = ((IN if group is None else group) * highest) ** -0.5
    assert scale.grad is not None
    found = scale.grad.reshape(OUT, -1) / factor
    torch.testing.assert_close(found, fake.scale.grad, rtol=1e-4, atol=1e-3)
    assert float(found.abs().max()) > 1.0
