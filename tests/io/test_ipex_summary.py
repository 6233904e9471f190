"""A summary of IPEX's own format gives its decisions and ranges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import calibrated
from torch import Tensor, nn

from torch_quant import Backend, InvalidConfig, Quantizer, sqnr
from torch_quant.io.ipex_summary import convert_ipex_summary


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.norm(self.conv(x)).relu().mean((2, 3)))
        z = self.inner(y) + y
        return torch.matmul(z.unsqueeze(2), z.unsqueeze(1))


def tensor(scale: float, zero_point: int, dtype: str = "torch.quint8") -> dict[str, Any]:
    return {"id": 0, "inf_dtype": dtype, "scale": [scale], "zero_point": [zero_point]}


def operator(kind: str, name: str, *inputs: dict[str, Any]) -> dict[str, Any]:
    return {"op_type": kind, "op_type_is_module": bool(name), "fqn": name,
            "input_tensor_infos": list(inputs)}  # fmt: skip


LINEAR = "<class 'torch.nn.modules.linear.Linear'>"
SUMMARY = {
    " ": {"q_op_infos": {
        "0": operator("<class 'torch.nn.modules.conv.Conv2d'>", "conv", tensor(0.02, 120)),
        "1": operator("<method 'relu' of 'torch._C.TensorBase' objects>", "", tensor(0.1, 0)),
        "2": operator(LINEAR, "head", tensor(0.5, 3, "torch.float32")),
        "3": operator("<built-in method matmul of type object at 0x7f>", "",
            tensor(0.01, 100), tensor(0.01, 100)),
    }},
    "inner": {"q_op_infos": {"0": operator(LINEAR, "inner.0", tensor(0.03, 7))}},
}  # fmt: skip


def test_decisions_and_ranges_are_taken(tmp_path: Path) -> None:
    (tmp_path / "ipex.json").write_text(json.dumps(SUMMARY))
    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    quantizer = Quantizer("reference")
    plan = quantizer.coverage(model, x).plan
    left = convert_ipex_summary(tmp_path / "ipex.json", tmp_path / "ours.json", plan)
    assert left == ["(root), operator 1: relu"]
    quantizer.load_summary(tmp_path / "ours.json")
    quantizer.quantize(model, example_inputs=x)
    plan = quantizer.plan
    assert plan.quantized == ("conv", "inner.0", "matmul")
    assert plan["head"].reason == "left in float by the IPEX summary"
    assert plan["inner.2"].reason == "not in the IPEX summary"
    grid = quantizer.state.qparams(plan["conv"].inputs[0], plan["conv"].activation)
    assert abs(float(grid.scale) - 0.02) < 1e-6
    assert int(grid.zero_point) == 120


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "ipex.json").write_text('{"format": "torch_quant summary"}')
    with pytest.raises(InvalidConfig, match="save_qconf_summary"):
        convert_ipex_summary(tmp_path / "ipex.json", tmp_path / "ours.json", Quantizer().plan)


@pytest.mark.skipif(
    Backend.IPEX.unavailable() is not None, reason=f"Backend.IPEX: {Backend.IPEX.unavailable()}"
)
@pytest.mark.filterwarnings("ignore")  # IPEX's use of deprecated parts of torch
def test_what_ipex_writes(tmp_path: Path) -> None:
    import intel_extension_for_pytorch as ipex

    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    mapping = ipex.quantization.default_static_qconfig_mapping
    prepared = ipex.quantization.prepare(model, mapping, example_inputs=(x,), inplace=False)
    prepared(x)
    prepared.save_qconf_summary(qconf_summary=str(tmp_path / "ipex.json"))

    quantizer = Quantizer("ipex")
    plan = quantizer.coverage(model, x).plan
    left = convert_ipex_summary(tmp_path / "ipex.json", tmp_path / "ours.json", plan)
    assert all("relu" in name.lower() or "add" in name.lower() for name in left), left
    quantizer.load_summary(tmp_path / "ours.json")
    quant_model = quantizer.quantize(model, example_inputs=x)
    written = json.loads((tmp_path / "ipex.json").read_text())[" "]["q_op_infos"].values()
    in_int8 = {
        entry["fqn"] or "matmul"
        for entry in written
        if all("qu" in tensor["inf_dtype"] for tensor in entry["input_tensor_infos"])
    }
    assert set(quantizer.plan.quantized) == in_int8
    assert {"conv", "matmul"} <= in_int8
    calibrated_here = calibrated(model, [((x,), {})], backend="ipex").quantize(model)
    assert sqnr(model(x), quant_model(x)) > sqnr(model(x), calibrated_here(x)) - 6
