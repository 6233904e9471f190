"""Root mean square norms are found however they are written, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from torch_quant.native.rms_norm import ADD_RMS_NORM, RMS_NORM
from torch_quant.passes.base import PassContext
from torch_quant.passes.rms_norms import fuse_rms_norms

SIZE = 12


class Model(nn.Module):
    def __init__(self, function: Callable[[Tensor, nn.Parameter], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, SIZE), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def root(x: Tensor, eps: float = 1e-5) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def llama(x: Tensor, weight: Tensor) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float32)
    return weight * (x * root(x)).to(dtype)


FOUND: dict[str, Callable[[Tensor, nn.Parameter], Tensor]] = {
    "llama": llama,
    "gemma": lambda x, w: (x.float() * root(x.float())) * (1.0 + w.float()),
    "type_as": lambda x, w: (x.float() * root(x.float())).type_as(x) * w,
    "functional": lambda x, w: nn.functional.rms_norm(x, (SIZE,), w, 1e-5),
    "functional, its own eps": lambda x, w: nn.functional.rms_norm(x, (SIZE,), w),
    "without a weight": lambda x, w: x * root(x),
    "square": lambda x, w: w * (x * torch.rsqrt(x.square().mean(-1, True) + 1e-5)),
    "product": lambda x, w: torch.rsqrt((x * x).mean(dim=2, keepdim=True) + 1e-5) * x * w,
    "division": lambda x, w: w * (x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5)),
    "eps first": lambda x, w: w * (x * torch.rsqrt(1e-5 + x.pow(2).mean([-1], keepdim=True))),
    "two": lambda x, w: llama(llama(x, w) * 2, w),
}
OTHERS: dict[str, Callable[[Tensor, nn.Parameter], Tensor]] = {
    "another axis": lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5),
    "a third power": lambda x, w: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-5),
    "not kept": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1) + 1e-5).unsqueeze(-1),
    "another tensor": lambda x, w: (x + 1) * root(x),
    "the root is read again": lambda x, w: _twice(x),
    "the root is divided by": lambda x, w: x / root(x),
    "eps of a tensor": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, True) + w.mean()),
    "eps times two": lambda x, w: (
        x * torch.rsqrt(torch.add(x.pow(2).mean(-1, True), 1e-5, alpha=2))
    ),
    "half": lambda x, w: x.double() * root(x.double()),
    "a layer norm": lambda x, w: nn.functional.layer_norm(x, (SIZE,), w),
}


def _twice(x: Tensor) -> Tensor:
    by = root(x)
    return x * by + by


def exported(function: Callable[[Tensor, nn.Parameter], Tensor]) -> tuple[fx.GraphModule, Tensor]:
    x = torch.randn(3, 5, SIZE, generator=torch.Generator().manual_seed(0))
    model = Model(function).eval()
    batch = {0: torch.export.Dim("batch", max=64)}
    program = torch.export.export(model, (x,), dynamic_shapes=(batch,))
    gm: fx.GraphModule = program.module()  # type: ignore[assignment]
    gm = fx.GraphModule(gm, gm.graph)
    for node in gm.graph.find_nodes(op="get_attr"):  # as captured graphs have it
        node.meta.setdefault("val", gm.get_parameter(str(node.target)))
    checks = torch.ops.aten._assert_tensor_metadata.default
    for node in list(gm.graph.nodes):
        if node.op == "call_module" or node.target is checks:
            gm.graph.erase_node(node)
    gm.recompile()
    return gm, x


def count(gm: fx.GraphModule) -> int:
    return sum(node.target in (RMS_NORM, ADD_RMS_NORM) for node in gm.graph.nodes)


def run(gm: fx.GraphModule, x: Tensor) -> Tensor:
    gm.recompile()
    gm.graph.lint()
    result = gm(x)
    return result if isinstance(result, Tensor) else result[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    gm, x = exported(FOUND[name])
    before = run(gm, x)
    found = fuse_rms_norms(PassContext(gm))
    assert found == count(gm) == (2 if name == "two" else 1)
    left = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert len(left) <= (3 if name == "two" else 2)  # beside it, a cast to its own type
    torch.testing.assert_close(run(gm, x), before, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(run(gm, x[:2]), before[:2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left(name: str) -> None:
    gm, x = exported(OTHERS[name])
    before = run(gm, x)
    assert fuse_rms_norms(PassContext(gm)) == count(gm) == 0
    assert torch.equal(run(gm, x), before)


def test_a_weight_is_not_taken_where_the_norm_is_read_without_it() -> None:
    def both(x: Tensor, w: Tensor) -> Tensor:
        norm = x * root(x)
        return norm * w + norm

    gm, x = exported(both)
    before = run(gm, x)
    assert fuse_rms_norms(PassContext(gm)) == 1
    (node,) = gm.graph.find_nodes(op="call_function", target=RMS_NORM)
    assert node.args[1] is None
    torch.testing.assert_close(run(gm, x), before, rtol=1e-6, atol=1e-7)


def test_a_sum_before_it_is_part_of_it() -> None:
    def residual(x: Tensor, w: Tensor) -> Tensor:
        total = x + x.sin()
        return total + llama(total, w)

    gm, x = exported(residual)
    before = run(gm, x)
    assert fuse_rms_norms(PassContext(gm)) == 1
    assert len(gm.graph.find_nodes(op="call_function", target=ADD_RMS_NORM)) == 1
    torch.testing.assert_close(run(gm, x), before, rtol=1e-6, atol=1e-7)


def test_a_sum_that_spreads_a_tensor_is_not() -> None:
    gm, x = exported(lambda x, w: llama(x + w, w))
    before = run(gm, x)
    assert fuse_rms_norms(PassContext(gm)) == 1
    assert not gm.graph.find_nodes(op="call_function", target=ADD_RMS_NORM)
    torch.testing.assert_close(run(gm, x), before, rtol=1e-6, atol=1e-7)
