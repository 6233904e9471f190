"""Linear layers with integer weights: this package's kernels beside those of PyTorch and others.

One thread, each layer cold (as many copies as do not fit in the caches, one after the other) and
hot (called right before). In decoding a layer is cold, as a model does not fit in a cache. All are
timed in turns in one run; microseconds are medians of the thread's own time, so that other work on
the machine costs little. Asserts nothing.

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/linear_kernels.py
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from harness import report
from torch import Tensor

from torch_quant import native
from torch_quant.backends.onednn.ops import LINEAR
from torch_quant.native.dynamic import DYNAMIC_LINEAR
from torch_quant.native.ops import WEIGHT_ONLY_LINEAR

SHAPES = ((4096, 4096), (1536, 576), (576, 1536), (49152, 576))
"""Outputs and inputs: a layer of a model with 7 billion parameters, and three of one with 135
million, the last of which is its vocabulary."""
ROWS = (1, 8, 32, 128, 512)
COLD = 100e6
"""Bytes that no cache holds."""
MOST_WORK = 20e9
"""Multiply-accumulates above which a case takes minutes."""
GROUP = 128

Product = Callable[[Tensor], object]


def group_of(inputs: int) -> int:
    return GROUP if inputs % GROUP == 0 else 64


def float32(outputs: int, inputs: int) -> Product:
    weight = torch.randn(outputs, inputs)
    return lambda x: torch.nn.functional.linear(x, weight)


def bfloat16(outputs: int, inputs: int) -> Product:
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    return lambda x: torch.nn.functional.linear(x.bfloat16(), weight)


def torch_int4(outputs: int, inputs: int) -> Product:
    """The kernel behind torchao's int4 on CPUs: bfloat16 activations."""
    group = group_of(inputs)
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    grid = torch.rand(inputs // group, outputs, 2, dtype=torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, group, grid)


def onnxruntime_int4(outputs: int, inputs: int) -> Product:
    """MatMulNBits in int8 arithmetic, onnxruntime's fastest."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    blocks = -(-inputs // GROUP)
    codes = np.random.randint(0, 256, (outputs, blocks, GROUP // 2), dtype=np.uint8)
    scales = np.random.rand(outputs * blocks).astype(np.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
        K=inputs, N=outputs, bits=4, block_size=GROUP, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(scales, "s")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x.numpy()})


def ours(bits: int, group: int | None) -> Callable[[int, int], Product]:
    def made(outputs: int, inputs: int) -> Product:
        size = group_of(inputs) if group == GROUP else group or inputs
        dtype = torch.uint8 if bits < 8 else torch.int8
        codes = torch.randint(0, 128, (outputs, inputs * bits // 8), dtype=dtype)
        scales = torch.rand(outputs, inputs // size)
        zero = 2 ** (bits - 1)
        return lambda x: WEIGHT_ONLY_LINEAR(x, codes, scales, None, None, bits, zero)

    return made


def dynamic(outputs: int, inputs: int) -> Product:
    codes, scales = torch.randint(-128, 128, (outputs, inputs)).to(torch.int8), torch.rand(outputs)
    return lambda x: DYNAMIC_LINEAR(x, codes, scales, None, False)


def known_grids(own: bool) -> Callable[[int, int], Product]:
    """Codes in and codes out, as in a static model."""

    def made(outputs: int, inputs: int) -> Product:
        weight = torch.randint(-128, 128, (outputs, inputs)).to(torch.int8)
        scales, x_grid, y_grid = torch.rand(outputs), (0.02, 120), (0.05, 110, torch.uint8)
        of_rows: dict[int, Tensor] = {}
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        zeros = torch.zeros(outputs, dtype=torch.int32)

        def product(x: Tensor) -> Tensor:
            if len(x) not in of_rows:
                of_rows[len(x)] = torch.randint(0, 256, x.shape, dtype=torch.uint8)
            codes = of_rows[len(x)]
            if own:
                options = (weight, scales, None, *y_grid, "none", [], "none")
                return LINEAR(codes, *x_grid, *options)  # type: ignore[no-any-return]
            return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
                codes, *x_grid, packed, scales, zeros, None, *y_grid, "none", [], "none"
            )

        return product

    return made


KINDS: dict[str, tuple[Callable[[int, int], Product], float]] = {
    "float32": (float32, 4.0),
    "bfloat16": (bfloat16, 2.0),
    "torch int4 (bf16)": (torch_int4, 0.5),
    "onnxruntime int4": (onnxruntime_int4, 0.5),
    "int4": (ours(4, GROUP), 0.5),
    "int4, groups of 32": (ours(4, 32), 0.5),
    "int2": (ours(2, GROUP), 0.25),
    "int8": (ours(8, None), 1.0),
    "int8, groups of 32": (ours(8, 32), 1.0),
    "int8 dynamic": (dynamic, 1.0),
    "int8 static": (known_grids(own=True), 1.0),
    "oneDNN int8 static": (known_grids(own=False), 1.0),
}
"""How a layer is made, and the bytes of a weight."""


def measured(
    products: dict[str, list[Product]], x: Tensor, hot: bool, seconds: float
) -> dict[str, list[float]]:
    """Microseconds of single calls, all products in turns until the time is up."""
    turns = {name: itertools.cycle(copies) for name, copies in products.items()}
    times: dict[str, list[float]] = {name: [] for name in products}
    for name in products:  # kernels are chosen, caches filled
        next(turns[name])(x)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, copies in turns.items():
            product = next(copies)
            if hot:
                product(x)
            begin = time.thread_time_ns()
            product(x)
            times[name].append((time.thread_time_ns() - begin) / 1e3)
    return times


def case(
    rows: int, outputs: int, inputs: int, cold: bool, seconds: float, names: list[str]
) -> dict[str, object]:
    products = {}
    for name in names:
        make, bytes_ = KINDS[name]
        copies = int(COLD / (bytes_ * outputs * inputs)) + 1 if cold else 1
        products[name] = [make(outputs, inputs) for _ in range(min(copies, 256))]
    times = measured(products, torch.randn(rows, inputs), not cold and rows == 1, seconds)
    sizes = {
        "rows": rows,
        "layer": f"{inputs} -> {outputs}",
        "cache": "cold" if cold else "hot" if rows == 1 else "",
    }
    return sizes | {name: round(statistics.median(found)) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case")
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--layers", type=int, nargs="*", default=list(range(len(SHAPES))))
    parser.add_argument("--only", nargs="*", default=list(KINDS), help="kinds of layers")
    given = parser.parse_args()
    rows = []
    with torch.no_grad():
        for outputs, inputs in (SHAPES[i] for i in given.layers):
            for count in given.rows:
                if count * outputs * inputs > MOST_WORK:
                    continue
                for cold in (True, False) if count == 1 else (False,):
                    rows.append(case(count, outputs, inputs, cold, given.seconds, given.only))
    how = {"kernels": native.instruction_sets(), "seconds": given.seconds}
    report("linear_kernels", rows, **how)


if __name__ == "__main__":
    main()
