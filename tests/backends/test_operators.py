"""Every operator of ours against PyTorch's own checks: schema, fake kernels, compilation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from flows import calibrated
from thinning import LONG, covering
from torch import Tensor, nn

import torch_quant  # noqa: F401  # defines the operators
from torch_quant import Backend, QConfig, QuantSpec, sqnr

Sample = tuple[Any, ...]


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def codes(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    info = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(info.min, info.max + 1, shape, dtype=dtype, generator=generator)


def weight(*shape: int) -> tuple[Tensor, Tensor]:
    return codes(*shape, dtype=torch.int8), floats(shape[0]).abs() + 0.1


LAYOUTS: dict[str, Tensor] = {
    "contiguous": floats(2, 3, 4, 5),
    "channels_last": floats(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": floats(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    "transposed": floats(2, 3, 4, 5).transpose(1, 3),
    "permuted": floats(2, 3, 4, 5).permute(3, 1, 0, 2),
    "matrix_transposed": floats(4, 5).t(),
    "strided": floats(2, 3, 8, 5)[:, :, ::2],
    "expanded": floats(4, 1).expand(4, 5),
    "scalar": floats(1)[0],
    "empty": floats(0, 5),
}
FEW = {name: LAYOUTS[name] for name in ("channels_last", "permuted", "expanded")}
QUANTIZED = (0.1, 3, torch.uint8)
FLOAT = (1.0, 0, torch.float32)


def linears() -> dict[str, Sample]:
    x = codes(2, 5, 8)
    ways = {"uint8": QUANTIZED, "float32": FLOAT}
    inputs = {"3d": x, "2d": x[0], "1d": x[0, 0], "transposed": codes(5, 2, 8).transpose(0, 1)}
    return {
        f"{name}-{way}": (each, 0.1, 3, *weight(6, 8), floats(6), *ending, "none", [], "none")
        for name, each in inputs.items()
        for way, ending in ways.items()
    } | {"gelu": (x, 0.1, 3, *weight(6, 8), None, *FLOAT, "gelu", [], "tanh")}


CONVS = {
    "1d": ((2, 8, 9), (16, 8, 3), 1),
    "1d_one_channel": ((1, 8, 9), (1, 8, 3), 1),
    "2d": ((2, 8, 9, 11), (16, 8, 3, 3), 1),
    "2d_depthwise": ((2, 8, 9, 11), (8, 1, 3, 3), 8),
    "2d_one_pixel": ((2, 8, 3, 3), (16, 8, 3, 3), 1),
    "2d_one_channel": ((1, 1, 9, 11), (1, 1, 3, 3), 1),
    "3d": ((2, 4, 5, 6, 7), (8, 4, 3, 3, 3), 1),
}


def attentions() -> dict[str, Sample]:
    def heads(count: int, tokens: int) -> Tensor:
        return codes(2, tokens, count, 8).transpose(1, 2)

    q, k, v = heads(4, 5), heads(2, 7), heads(2, 7)
    ending = (0.3, [0.02, 0.02, 0.02, 1 / 255], [128, 128, 128, 0], 255)
    flat = (codes(3, 5, 8), codes(3, 7, 8), codes(3, 7, 6))
    return {
        "shared heads": (q, k, v, None, True, *ending, *QUANTIZED, True),
        "float mask": (q, k, v, floats(2, 1, 1, 7), False, *ending, *FLOAT, False),
        "bool mask": (*flat, floats(5, 7) > 0, False, *ending, *FLOAT, False),
    }


def convs() -> dict[str, Sample]:
    found: dict[str, Sample] = {}
    for name, (shape, kernel, groups) in CONVS.items():
        dims = len(shape) - 2
        geometry = ([1] * dims, [0] * dims, [1] * dims, groups)
        for way, ending in {"uint8": QUANTIZED, "float32": FLOAT}.items():
            operands = (codes(*shape), 0.1, 3, *weight(*kernel), floats(kernel[0]))
            found[f"{name}-{way}"] = (*operands, *geometry, *ending, "none", [])
    geometry = ([2, 1], [1, 2], [1, 2], 1)
    x = codes(2, 8, 9, 11).to(memory_format=torch.channels_last)
    operands = (x, 0.1, 3, *weight(16, 8, 3, 3), None)
    found["2d_strided_relu"] = (*operands, *geometry, *QUANTIZED, "relu", [])
    return found


def recurrent(gates: int) -> Sample:
    """A bidirectional layer: input, hidden state, parameters, whether they have biases, layers."""
    cell = (floats(4 * gates, 6), floats(4 * gates, 4), floats(4 * gates), floats(4 * gates))
    return floats(3, 5, 6), floats(2, 3, 4), [*cell, *cell], True, 1


def lstm(*options: Any) -> Sample:
    x, h, *rest = recurrent(4)
    return (x, [h, h + 1], *rest, *options)


def whole(gates: int) -> dict[str, Sample]:
    make = lstm if gates == 4 else lambda *options: (*recurrent(gates), *options)
    return {"batch_first": make(0.0, False, True, True)}


SIZES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Kind of recurrent layer -> blocks of rows of its matrices."""


def packed(kind: str) -> dict[str, Sample]:
    cell = (floats(4 * SIZES[kind], 6), floats(4 * SIZES[kind], 4))
    h = floats(1, 3, 4)
    states = [h, h + 1] if kind == "lstm" else h
    options = (False, 1, 0.0, False, False, False, torch.tensor([3, 2, 2]))
    return {"": (floats(7, 6), states, [*cell], *options)}


def stepping(integers: bool) -> dict[str, Sample]:
    """Layers that round at each step: of floats, or of integers and their scales."""
    found = {}
    for kind, gates in SIZES.items():
        h = floats(4, 3, 4)
        states = [h, h + 1] if kind == "lstm" else [h]
        rows = 4 * gates
        for name, sizes in {"packed": torch.tensor([3, 2, 2]), "padded": None}.items():
            x = floats(5, 3, 6) if sizes is None else floats(7, 6)
            flags = (sizes, kind, True, True, False)
            if integers:
                widths = [6, 4, 6, 4, 8, 4, 8, 4]
                pairs = [weight(rows, width) for width in widths]
                some = [each for each, _ in pairs], [each for _, each in pairs]
                biases = [floats(rows) for _ in widths]
                found[f"{kind}-{name}"] = (x, states, some[0], *flags, some[1], biases, False)
            else:
                ends = (floats(rows), floats(rows))
                cells = [(floats(rows, width), floats(rows, 4), *ends) for width in (6, 6, 8, 8)]
                params = [each for cell in cells for each in cell]
                found[f"{kind}-{name}"] = (x, states, params, *flags, *TOKENS)
    return found


def cells(integers: bool) -> dict[str, Sample]:
    found = {}
    for kind, gates in SIZES.items():
        h, rows = floats(3, 4), 4 * gates
        states = [h, h + 1] if kind == "lstm" else [h]
        if integers:
            pairs = [weight(rows, 6), weight(rows, 4)]
            codes_, scales = ([pair[i] for pair in pairs] for i in (0, 1))
            found[kind] = (floats(3, 6), states, codes_, kind, False, scales, [], True)
        else:
            params = [floats(rows, 6), floats(rows, 4)]
            found[kind] = (floats(3, 6), states, params, kind, False, *TOKENS)
    return found


GRID = (0.1, 3, 0, 255)
TOKENS = ("uint8", False, "per_token", "float32")
TENSORS = (torch.tensor(0.1), torch.tensor(3, dtype=torch.int32), "uint8")
TABLE = weight(12, 6)
BAGS = (torch.tensor([1, 2, 4, 5, 4, 3]), torch.tensor([0, 2, 4]))


def formats(operator: str) -> dict[str, Sample]:
    """Groups of four and whole tensors, of each kind of element: by name, the arguments."""
    found: dict[str, Sample] = {}
    for name in ("int8", "int4", "uint16", "float8_e4m3fn", "float4_e2m1"):
        for kind, sizes in {"groups": (6, 2), "whole": ()}.items():
            grid = (torch.full(sizes, 0.25), torch.zeros(sizes, dtype=torch.int32), name)
            x = torch.linspace(0.0, 1.5, 48).reshape(6, 8)
            quantized = torch.ops.torch_quant.quantize(x, *grid)
            if quantized.dtype.is_floating_point and operator in ("decode", "dequantize"):
                continue  # opcheck multiplies inputs, which float8 has no kernel for
            first = x if operator in ("quantize", "fake_quantize") else quantized
            found[f"{name}-{kind}"] = (first, name) if operator == "decode" else (first, *grid)
    return found


def layouts() -> dict[str, Sample]:
    return {name: (x, *TENSORS) for name, x in FEW.items()}


SAMPLES: dict[str, Callable[[], dict[str, Sample]]] = {
    "quantize": lambda: formats("quantize") | layouts(),
    "dequantize": lambda: formats("dequantize"),
    "fake_quantize": lambda: formats("fake_quantize") | layouts(),
    "trained_fake_quantize": lambda: {
        f"{role} {name}": (*sample, "float32", role, "lsq", "")
        for role in ("input", "weight")
        for name, sample in (formats("fake_quantize") | layouts()).items()
        if not name.startswith(
            "float8"
        )  # opcheck looks inside, and multiplies what is float8 there
    },
    "decode": lambda: formats("decode"),
    "choose_qparams": lambda: {
        f"{kind} {name}": (x, "uint8", symmetric, kind, "float32")
        for name, x in FEW.items()
        for kind, symmetric in (("per_tensor", False), ("per_token", True), ("per_group(1)", True))
    },
    "quantize_per_tensor": lambda: {k: (x, *GRID, torch.uint8) for k, x in FEW.items()},
    "dequantize_per_tensor": lambda: {"": (codes(2, 3), 0.1, 3)},
    "fake_quantize_per_tensor": lambda: {k: (x, *GRID) for k, x in FEW.items()},
    "dequantize_per_channel": lambda: {
        "": (TABLE[0], TABLE[1], torch.zeros(12, dtype=torch.int32), 0),
    },
    "grouped_linear": lambda: {"": (floats(10, 4), floats(9, 4), torch.tensor([3, 3, 8]))},
    "onnx_weight": lambda: {
        "": (codes(4, 8, dtype=torch.int8), floats(4, 2).abs(), torch.zeros(4, 2).int(), "int8")
    },
    "weight_only_linear": lambda: {
        "int4": (floats(3, 64), codes(6, 32), floats(6, 2), None, floats(6), 4, 8),
        "affine": (floats(3, 64), codes(6, 32), floats(6, 2), codes(6, 2) % 16, None, 4, 8),
    },
    "weight_only_linears": lambda: {
        "two formats": (
            floats(3, 64),
            [codes(6, 32), codes(2, 64)],
            [floats(6, 2), floats(2, 1)],
            [],
            [floats(6), floats(2)],
            [4, 8],
            [8, 128],
        )
    },
    "gated_linear": lambda: {
        f"{count} weights": (
            floats(2, 3, 64),
            [codes(64, 32)] * count,
            [floats(64, 2)] * count,
            [codes(64, 2) % 16] * count,
            [],
            [4] * count,
            [8] * count,
            "silu",
        )
        for count in (2, 3)
    },
    "rms_norm": lambda: {
        "weight": (floats(2, 3, 8), floats(8), 1e-6, 1.0),
        "alone": (floats(3, 8), None, 1e-6, 0.0),
    },
    "add_rms_norm": lambda: {"": (floats(2, 3, 8), floats(2, 3, 8), floats(8), 1e-6, 0.0)},
    "weight_only_experts": lambda: {
        "": (floats(5, 64), codes(6, 32), floats(6, 2), None, torch.tensor([2, 5]), 4, 8)
    },
    "dynamic_linear": lambda: {
        "": (floats(3, 64), *weight(6, 64), floats(6), False),
        "gelu": (floats(3, 64), *weight(6, 64), None, True, "gelu", [], "tanh"),
    },
    "dynamic_linears": lambda: {
        "": (floats(3, 64), *map(list, zip(weight(6, 64), weight(5, 64), strict=True)), [], False)
    },
    "packed_embedding": lambda: {
        "": (codes(6, 32), floats(6, 2), None, torch.tensor([[1, 2]]), 4, 8, 64)
    },
    "lstm": lambda: {"": lstm(True, True, *TENSORS)},
    "whole_lstm": lambda: whole(4),
    "whole_gru": lambda: whole(3),
    "whole_rnn_tanh": lambda: whole(1),
    "whole_rnn_relu": lambda: whole(1),
    "packed_zeros": lambda: {"": (floats(7, 6), torch.tensor([3, 2, 2]), 2, 4)},
    "packed_lstm": lambda: packed("lstm"),
    "packed_gru": lambda: packed("gru"),
    "packed_rnn_tanh": lambda: packed("rnn_tanh"),
    "packed_rnn_relu": lambda: packed("rnn_relu"),
    "recurrent": lambda: stepping(False),
    "dynamic_recurrent": lambda: stepping(True),
    "recurrent_cell": lambda: cells(False),
    "dynamic_cell": lambda: cells(True),
    "onednn_quantize": lambda: {
        f"{name}-{dtype}": (x, 0.1, 3, dtype)
        for name, x in LAYOUTS.items()
        for dtype in (torch.uint8, torch.int8)
    },
    "onednn_linear": linears,
    "onednn_conv": convs,
    "int8_attention": attentions,
    "int8_matmul": lambda: {
        "uint8": (codes(2, 3, 5, 7), codes(2, 1, 7, 9), [0.1, 0.1], [1, 2], *QUANTIZED),
        "float32": (codes(5, 7), codes(9, 7).mT, [0.1, 0.1], [1, 2], *FLOAT),
    },
    "round_rows": lambda: (
        {
            f"{name}-{function}": (x, None, function, *QUANTIZED)
            for name, x in FEW.items()
            for function in ("none", "gelu")
        }
        | {"factors": (floats(2, 3, 5), floats(5), "none", *QUANTIZED)}
    ),
    "norm_rows": lambda: {
        "sum": (
            floats(2, 5),
            floats(2, 5),
            floats(5),
            floats(5),
            0.1,
            floats(5),
            *QUANTIZED,
            True,
            True,
        ),
        "alone": (FEW["permuted"], None, None, None, 0.1, None, *QUANTIZED, False, False),
    },
    "int8_embedding": lambda: {"": (*TABLE, torch.tensor([[1, 2], [3, 3]]))},
    "int8_embedding_bag": lambda: {
        "sum": (*TABLE, *BAGS, 0, floats(6), False, None),
        "mean": (*TABLE, *BAGS, 1, None, True, None),
        "max": (*TABLE, *BAGS, 2, None, False, 4),
    },
}


def runnable() -> set[str]:
    """Operators with a kernel; those without only stand in graphs that are translated."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("torch_quant::")]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = ("CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    return {name.partition("::")[2] for name in names if any(has_kernel(name, key) for key in keys)}


def test_every_operator_has_samples() -> None:
    assert runnable() == set(SAMPLES)


def words(name: str) -> set[str]:
    """What a sample is of: its shape or layout, its format, how it ends."""
    return set(re.split(r"[- ]", name))


def taken(names: Iterable[str]) -> list[str]:
    """A few samples as they are; of many, as few as have each word of their names."""
    every = list(names)
    return covering(every, words) if len(every) > 4 else every


@pytest.mark.parametrize("operator", sorted(SAMPLES))
def test_every_run_takes_each_shape_format_and_ending(operator: str) -> None:
    every = SAMPLES[operator]()
    some = taken(every)
    assert set(some) <= set(every)
    assert set().union(*map(words, some)) == set().union(*map(words, every))
    assert len(some) == len(every) if len(every) < 5 else len(some) < len(every)


def test_what_every_run_takes_of_the_longest_lists() -> None:
    def has(operator: str, *parts: str) -> bool:
        names = taken(SAMPLES[operator]())
        return all(any(part in name for name in names) for part in parts)

    assert has("onednn_conv", *CONVS, "2d-", "1d-", "2d_strided_relu", "uint8", "float32")
    assert has("onednn_linear", "3d", "2d", "1d", "transposed", "gelu", "uint8", "float32")
    assert has("onednn_quantize", *(f"{layout}-" for layout in LAYOUTS), "torch.int8", "uint8")
    assert has("choose_qparams", "per_tensor", "per_token", "per_group(1)", *FEW)
    assert has("round_rows", "none", "gelu", "factors", *FEW)
    for operator in ("quantize", "fake_quantize", "trained_fake_quantize"):
        assert has(operator, "int8", "int4", "uint16", "float4_e2m1", "groups", "whole", *FEW)


@pytest.mark.sparse
@pytest.mark.parametrize("operator", sorted(SAMPLES))
def test_operators_are_what_they_say(operator: str) -> None:
    if operator.startswith("onednn") and Backend.ONEDNN.unavailable():
        pytest.skip(f"Backend.ONEDNN: {Backend.ONEDNN.unavailable()}; run on an x86 CPU")
    samples = SAMPLES[operator]()
    for name in samples if LONG else taken(samples):
        overload = getattr(torch.ops.torch_quant, operator).default
        try:
            torch.library.opcheck(overload, samples[name])
        except Exception as error:
            raise AssertionError(f"{operator}({name})") from error


class Network(nn.Module):
    """Convolutions whose results other operators read in whatever order they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2)
        self.depthwise, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.depthwise(self.second(x) * 2)
        return self.head(x.flatten(2).transpose(1, 2)).mean(1)


@pytest.mark.thin
@pytest.mark.parametrize("signed", [False, True], ids=["u", "s"])
@pytest.mark.parametrize("backend", ["onednn", "reference"])
def test_a_quantized_network_compiles(backend: str, signed: bool) -> None:
    if backend == "onednn" and Backend.ONEDNN.unavailable():
        pytest.skip(f"Backend.ONEDNN: {Backend.ONEDNN.unavailable()}; run on an x86 CPU")
    torch.manual_seed(0)
    model, x = Network().eval(), floats(2, 3, 14, 12)
    config = QConfig(input=QuantSpec.of(signed=signed, symmetric=signed))
    quantizer = calibrated(model, [((x,), {})], backend=backend, qconfig=config)
    quant_model = quantizer.quantize(model)
    torch._dynamo.reset()
    compiled = torch.compile(quant_model, backend="aot_eager")
    with torch.no_grad():
        assert sqnr(quant_model(x), compiled(x)) > 60
        assert sqnr(quant_model(x[:1]), compiled(x[:1])) > 60
