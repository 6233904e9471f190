"""A training method of one's own: one class, which says how gradients pass the rounding."""

from __future__ import annotations

import pytest
import torch
from models import MODELS, example
from torch import Tensor

from torch_quant import InvalidConfig, QatMethod, QConfig, Quantizer, QuantSpec, register_qat_method
from torch_quant.qat.methods import QAT_METHODS, Rounding


class Scaled(QatMethod):
    """Element-wise gradient scaling: Lee et al. 2021, "Network Quantization with Element-wise
    Gradient Scaling", equation 5. Where rounding went against the gradient, that counts more."""

    name = "element_wise"

    def learns_scale(self, role: str, spec: QuantSpec) -> bool:
        return role == "input"

    def input_gradient(self, rounding: Rounding) -> Tensor:
        missed = (rounding.x - rounding.rounded) / rounding.scale
        factor = 1.0 + 0.2 * rounding.grad.sign() * missed
        return rounding.grad_inside * factor


def test_a_method_is_one_class() -> None:
    register_qat_method(Scaled)
    model, inputs = MODELS["mlp"](), example("mlp", 32)
    config = QConfig(input=QuantSpec.of(bits=4), weight=QuantSpec.of("int4", per_channel=True))
    quantizer = Quantizer("reference", qconfig=config)
    quantizer.calib(model)(*inputs)
    with torch.enable_grad():
        gradients = []
        for method in ("fixed", "element_wise"):
            qat_model = quantizer.qat(model, method)
            qat_model(*inputs).square().mean().backward()
            gradients.append(model[0].weight.grad.clone())
            learned = {name for name, _ in qat_model.named_parameters()}
            assert ("0.input_scale" in learned) == (method == "element_wise")
            assert "0.weight_scale" not in learned
            model.zero_grad()
        assert not torch.equal(*gradients)
        groups = quantizer.parameter_groups(qat_model, lr=1e-2, scale_lr=1e-3)
        optimizer = torch.optim.SGD(groups)
        qat_model(*inputs).square().mean().backward()
        optimizer.step()
    assert torch.equal(quantizer.quantize(qat_model)(*inputs), qat_model(*inputs))
    del QAT_METHODS["element_wise"]


def test_names_are_needed_and_unique() -> None:
    with pytest.raises(InvalidConfig, match="has no name"):
        register_qat_method(type("Nameless", (QatMethod,), {}))
    with pytest.raises(InvalidConfig, match="'lsq' is taken by LearnedStep"):
        register_qat_method(type("Other", (QatMethod,), {"name": "lsq"}))
