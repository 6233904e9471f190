"""The library of kernels, what is remembered of weights, and what is computed without either."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import test_product_kernels as products
import test_row_kernels as rows
import test_static_kernels as static
import torch
from processor import without_kernels
from torch import Tensor

from torch_quant import InvalidConfig, native
from torch_quant.native import library
from torch_quant.native.dynamic import DYNAMIC_LINEAR
from torch_quant.native.ops import WEIGHT_ONLY_LINEAR

needs_kernels = pytest.mark.skipif(not native.instruction_sets(), reason=f"{native.unavailable()}")


def test_kernels_are_built_where_there_is_a_compiler() -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or os.environ.get(native.VARIABLE) == "none":
        pytest.skip("no C++ compiler: kernels are optional")
    assert native.unavailable() is None


@needs_kernels
def test_instructions_that_this_cpu_has_not() -> None:
    with (
        pytest.raises(InvalidConfig, match=r"names 'amx'; this CPU runs plain"),
        native.using("amx"),
    ):
        raise AssertionError("not reached")


def test_a_library_that_is_missing_broken_or_old(tmp_path: Path) -> None:
    found, why = library._find(tmp_path / "kernels.so")
    assert found is None
    assert "are not built: build them with a C++ compiler: pip install -e ." in why
    (tmp_path / "kernels.so").write_text("no library")
    found, why = library._find(tmp_path / "kernels.so")
    assert found is None
    assert "cannot be loaded" in why


WITHOUT = """
import warnings, torch
from torch_quant import native, recipes, Quantizer, sqnr
assert native.unavailable() == "TORCH_QUANT_KERNELS=none forbids them", native.unavailable()
assert native.instruction_sets() == ()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8)).eval()
x = torch.randn(5, 64)
with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for config in (recipes.int4_weight_only(group_size=32), recipes.int8_weight_only(),
                   recipes.int8_dynamic(), recipes.int8_dynamic(symmetric=True)):
        found = Quantizer("onednn", qconfig=config).quantize(model, example_inputs=x)(x)
        same = Quantizer("reference", qconfig=config).quantize(model, example_inputs=x)(x)
        torch.testing.assert_close(found, same, rtol=1e-5, atol=1e-5)
(warning,) = [str(each.message) for each in caught if "torch_quant" in str(each.message)]
assert "computes with dequantized weights" in warning and "forbids them" in warning, warning
"""


def test_without_the_library_results_are_right_and_a_warning_says_so() -> None:
    """Of layers, and of each file of kernels, in one process: torch takes longest to import."""
    codes = (WITHOUT, *(each.WITHOUT for each in (products, rows, static)))
    without_kernels("\n".join(codes), __file__)


def test_what_is_remembered_of_a_weight_is_not_taken_for_another() -> None:
    """Weights that die, move, change in place, or get other scales."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator)

    def check(codes: Tensor, scale: Tensor) -> None:
        found = WEIGHT_ONLY_LINEAR(x, codes, scale, None, None, 8, 128)
        real = (codes.to(torch.float32)) * scale.to(torch.float32)
        torch.testing.assert_close(found, x @ real.T, rtol=1e-3, atol=1e-3 * float(real.norm()))

    for turn in range(50):  # memory is used again
        codes = torch.randint(-127, 128, (16, 64), dtype=torch.int8, generator=generator)
        scale = torch.rand(16, 1, generator=generator) + 0.1
        check(codes, scale)
        check(codes, scale * 2)
        codes.mul_(-1)
        check(codes, scale)
        scale.mul_(3)
        check(codes, scale)
        codes.data = torch.randint(-127, 128, (8 + turn, 64), dtype=torch.int8)
        check(codes, torch.rand(8 + turn, 1) + 0.1)
        check(codes.T.contiguous().T, torch.rand(8 + turn, 1) + 0.1)
        half = (torch.rand(8 + turn, 1) + 0.1).half()
        check(codes, half)
        half.mul_(2)
        check(codes, half)
    with pytest.raises(InvalidConfig, match="rows of 32 codes"):
        WEIGHT_ONLY_LINEAR(x[:, :32].contiguous(), codes, half, None, None, 8, 128)


@pytest.mark.parametrize("biased", [False, True])
def test_layers_without_inputs(biased: bool) -> None:
    bias = torch.arange(4.0) if biased else None
    expected = torch.zeros(2, 4) if bias is None else bias.expand(2, 4)
    codes, scale = torch.zeros(4, 0, dtype=torch.uint8), torch.ones(4, 1)

    def check() -> None:
        found = WEIGHT_ONLY_LINEAR(torch.ones(2, 0), codes, scale, None, bias, 4, 8)
        assert torch.equal(found, expected)
        found = DYNAMIC_LINEAR(torch.ones(2, 0), codes.view(torch.int8), scale, bias, False)
        assert torch.equal(found, expected)

    check()  # also where there is no library
    for instructions in native.instruction_sets():
        with native.using(instructions):
            check()
