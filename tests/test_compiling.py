"""``torch.compile`` takes a quantized model as one graph, in whatever way it was captured."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from flows import BACKENDS, CASES, Case, calibrated, run
from models import normal, seeded
from thinning import LONG, rarely
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_quant import CaptureFailed, Quantizer, sqnr
from torch_quant.convert.quantized import QuantizedModule

TRIED = [
    (name, backend)
    for name, backend in (("llama_cache", "reference"), ("dict_input", "onednn"))
    if backend in BACKENDS and (LONG or name == "dict_input")
]


def quantized(case: Case, **options: Any) -> QuantizedModule:
    model = case.build()
    run(model, case.inputs(3))  # some models keep what they computed at their first call
    return calibrated(model, [case.inputs(3)], **options).quantize(model)


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def tensors(outputs: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


@pytest.mark.thin
@pytest.mark.parametrize("capture", ["whole", "modules"])
@pytest.mark.parametrize(("name", "backend"), TRIED)
def test_is_one_graph_with_the_same_outputs(name: str, backend: str, capture: str) -> None:
    if (name, capture) == ("llama_cache", "modules") and torch.__version__.startswith("2.8."):
        pytest.skip("Dynamo of torch 2.8 does not trace this glue of transformers: use a newer one")
    case = CASES[name]
    quant_model = quantized(case, backend=backend, capture=capture)
    model = compiled(quant_model)
    for batch in (3, 2):
        expected, outputs = run(quant_model, case.inputs(batch)), run(model, case.inputs(batch))
        assert type(outputs) is type(expected)
        assert sqnr(tensors(expected), tensors(outputs)) == float("inf")  # the same operators


class Either(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: float = 1.0, *, flip: bool = False) -> Tensor:
        return self.head(x.flip(0) if flip else x) * scale


def test_each_kind_of_call_takes_its_graph() -> None:
    model, x = seeded(Either).eval(), normal(4, 8)
    calls: list[dict[str, Any]] = [{}, {"flip": True}]
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    for call in calls:
        calib_model(x, **call)
    quant_model = quantizer.quantize(model)
    fast = compiled(quant_model)
    for call in calls:
        assert torch.equal(fast(x, **call), quant_model(x, **call))
    batch = normal(2, 3, 8)  # of another rank, which has to be captured
    with pytest.raises(CaptureFailed, match="while the model is traced: call it so before"):
        torch.compile(quant_model, backend="aot_eager")(batch)
    assert torch.equal(quant_model(batch), compiled(quant_model)(batch))


def test_where_pytorch_has_a_fast_path_the_code_around_it_is_not_compiled() -> None:
    """The layer would compute with the float weights that a quantized model does not have."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, x = seeded(lambda: nn.TransformerEncoder(layer, 1)).eval(), normal(2, 5, 16)
    quant_model = calibrated(model, [((x,), {})], backend="reference", capture="modules").quantize(
        model
    )
    torch._dynamo.reset()
    compiled_model = torch.compile(quant_model, backend="aot_eager")
    torch.testing.assert_close(compiled_model(x), quant_model(x))  # operators taken apart


class Sized(nn.Module):
    """Which code runs is decided by a size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) if x.shape[0] > 4 else self.head(x) * 100


@pytest.mark.parametrize("dynamic", [None, rarely(False)])
def test_sizes_choose_the_graph(dynamic: bool | None) -> None:
    model = seeded(Sized)
    quant_model = calibrated(model, [((normal(8, 8),), {}), ((normal(2, 8),), {})]).quantize(model)
    for each in (quant_model, pickle.loads(pickle.dumps(quant_model))):
        torch._dynamo.reset()
        model = torch.compile(each, backend="aot_eager", dynamic=dynamic)
        for batch in (8, 2, 3, 6):
            x = normal(batch, 8)
            torch.testing.assert_close(model(x), quant_model(x))
