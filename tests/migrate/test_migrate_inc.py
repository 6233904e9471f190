"""Configurations of Intel Neural Compressor give its numbers, and nothing is dropped silently.

The files in ``data`` were written by neural-compressor 3.10 itself (``config.to_json_file``);
``outputs.json`` has configurations, the ``qconfig.json`` beside a saved model, and the outputs of
models that its ``prepare`` and ``convert`` quantized, whose weights are :func:`filled` as here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import data_of, run
from torch import Tensor, nn

from torch_quant import (
    AWQ,
    FLOAT,
    GPTQ,
    AutoRound,
    InvalidConfig,
    PerGroup,
    Quantizer,
    SmoothQuant,
    recipes,
)
from torch_quant.migrate import Outcome, from_inc

DATA = Path(__file__).parent / "data"
OUTPUTS = json.loads((DATA / "outputs.json").read_text())


def filled(shape: torch.Size, phase: int) -> Tensor:
    count = torch.arange(shape.numel(), dtype=torch.float64) + phase
    return ((count * 12.9898).sin() * 4.37).frac().reshape(shape).float() * 0.1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 32), nn.Linear(32, 64)
        self.lm_head = nn.Linear(64, 8)
        with torch.no_grad():
            for i, each in enumerate(self.parameters()):
                each.copy_(filled(each.shape, i))

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.fc2(torch.relu(self.fc1(x))))


def inputs() -> Tensor:
    return (torch.arange(128, dtype=torch.float64).mul(7.77).sin() * 3).reshape(2, 64).float()


@pytest.mark.parametrize(
    ("name", "entry", "share"),
    [
        ("asymmetric", "config", 0.02),  # the tool keeps scales in float16
        ("asymmetric", "saved", 0.02),
        ("symmetric", "config", 0.02),
        ("full_range", "config", 0.02),
        ("mx_fp8_e4m3", "config", 1e-4),
        ("mx_fp4", "config", 1e-4),
    ],
)
def test_the_numbers_are_those_of_the_tool(name: str, entry: str, share: float) -> None:
    model, x = Net().eval(), inputs()
    theirs = torch.tensor(OUTPUTS[name]["y"])
    quantizer = from_inc(OUTPUTS[name][entry]).quantizer(backend="reference")
    ours = quantizer.quantize(model, example_inputs=x)(x)
    assert (ours - theirs).norm() < share * (model(x) - theirs).norm()
    heads = {"lm_head"} if "mx" in name else set()
    assert set(quantizer.plan.quantized) == {"fc1", "fc2"} | heads


def test_local_settings_hold_as_there() -> None:
    """The last that matches holds, from the beginning of a name, whatever it leads to."""
    found = from_inc(DATA / "rtn.json")
    names = ["layers.0.mlp.down", "layers.0.mlp.up", "layers.0.attn.q", "lm_head"]
    model = nn.Sequential()
    for name in names:
        here: nn.Module = model
        for part in name.split("."):
            if part not in here._modules:
                here.add_module(part, nn.Sequential())
            holder, here = here, here._modules[part]  # type: ignore[assignment]
        holder.add_module(part, nn.Linear(32, 32))
    quantizer = found.quantizer(backend="reference")
    quantizer.quantize(model, example_inputs=torch.ones(1, 32))
    assert {n: str(s.weight) if s.quantized else "float" for n, s in quantizer.plan.items()} == {
        "layers.0.mlp.down": "float",
        "layers.0.mlp.up": "s8 symmetric per-channel",
        "layers.0.attn.q": "u4 affine per-group(32)",
        "lm_head": "float",
    }
    local = OUTPUTS["symmetric"]["config"]["local"]["fc2"]
    whole = OUTPUTS["symmetric"]["config"]["global"]
    later = from_inc({"global": whole, "local": {"fc2": local, ".*": {**local, "bits": 3}}})
    quantizer = later.quantizer(backend="reference")
    quantizer.quantize(Net(), example_inputs=inputs())
    assert quantizer.plan["fc2"].weight.bits == 3


def test_what_each_class_becomes() -> None:
    gptq = from_inc(DATA / "gptq.json")
    method = GPTQ(2048, act_order=True, damping=0.1, static_groups=True, clip_search=False)
    assert gptq.qconfig.method == method
    assert gptq.needs_blocks
    told = {row.entry: row for row in gptq.unmapped}
    assert told["use_double_quant = true"].outcome is Outcome.LEFT_OUT
    assert any("act_order" in entry for entry in told)
    rounded = from_inc(DATA / "autoround.json").qconfig
    assert isinstance(rounded.method, AutoRound)
    assert (rounded.method.iterations, rounded.method.learning_rate) == (50, 0.01)
    assert str(rounded.weight) == "s4 symmetric per-group(32), float16 scales"
    static = from_inc(DATA / "static.json")
    assert str(static.qconfig.input) == "s8 symmetric per-tensor"
    assert static.qconfig.observer == "entropy"
    assert static.overrides == {"re:(?:head).*": None}
    assert from_inc(DATA / "smooth.json").qconfig.transforms == (SmoothQuant(0.7),)
    small = from_inc(DATA / "fp8.json")
    assert str(small.qconfig.input) == "float8_e5m2 per-tensor"
    assert small.overrides == {"re?:.*lm_head.*": None, "class:torch.nn.Conv2d": None}
    assert small.module_filter.include_op_types == ("linear", "conv2d", "embedding_bag")
    awq = from_inc({"use_auto_scale": True, "use_auto_clip": False, "group_size": -1})
    assert awq.qconfig.transforms == (AWQ(clip=False),)
    hqq = from_inc({"bits": 3, "group_size": 64, "quant_zero": False})
    assert hqq.qconfig.weight.float_zero_points
    assert hqq.qconfig.weight.granularity == PerGroup(64)
    scheme = from_inc({"scheme": "MXFP4"}).qconfig
    assert str(scheme.weight) == "float4_e2m1 per-group(32), e8m0 scales"
    assert from_inc({"dtype": "bf16"}).qconfig == recipes.bfloat16()
    dynamic = from_inc({"act_algo": "kl"}, kind="DynamicQuantConfig")
    assert not dynamic.qconfig.needs_ranges


def test_several_configurations_quantize_what_they_list() -> None:
    quantizer = from_inc(DATA / "composable.json").quantizer(backend="reference")
    model = Net()
    quantizer.calib(model)(inputs())
    quantizer.quantize(model)
    plan = quantizer.plan
    assert plan.quantized == ("fc1", "fc2")
    assert (plan["fc1"].weight.bits, plan["fc2"].weight.bits) == (8, 4)
    assert isinstance(plan["fc2"].method, GPTQ)


class Config:
    """As the tool's configurations are read: a name, and ``to_dict`` with classes as keys."""

    name = "rtn"

    def to_dict(self) -> dict[str, Any]:
        return {"global": {"bits": 4}, "local": {nn.Linear: {"dtype": "fp32"}, print: {"bits": 8}}}


def test_classes_and_what_is_neither_class_nor_name() -> None:
    found = from_inc(Config())
    assert found.overrides["class:torch.nn.Linear"] is None
    assert [row.entry for row in found.unmapped] == ["local print"]


def test_every_option_is_accounted_for() -> None:
    found = from_inc({"bits": [4, 8], "group_size": 32, "use_full_range": False, "new": 1})
    outcomes = {row.entry: row.outcome for row in found}
    assert outcomes["bits = [4, 8]"] is Outcome.DIFFERS
    assert outcomes["new = 1"] is Outcome.LEFT_OUT
    rounded = from_inc({"iters": 1, "bits": [4, 8], "scheme": {"group_size": 32, "odd": 2}})
    assert str(rounded.qconfig.weight) == "s4 symmetric per-group(32), float16 scales"
    outcomes = {row.entry: row.outcome for row in rounded}
    assert outcomes["bits = [4, 8]"] is Outcome.DIFFERS
    assert outcomes["scheme: odd = 2"] is Outcome.LEFT_OUT
    codebook = from_inc({"dtype": "nf4", "use_double_quant": True})
    assert [row.outcome for row in codebook.unmapped] == [Outcome.DIFFERS, Outcome.LEFT_OUT]
    assert "nf4" in str(codebook)
    assert "<table>" in codebook._repr_html_()


def test_what_has_no_effect_is_not_the_same() -> None:
    rtn = {"bits": 4, "use_full_range": False, "white_list": ["Conv2d"]}
    found = from_inc({"rtn": rtn, "hqq": {"bits": 3, "quant_zero": False}})
    rows = {row.entry: row for row in found}
    assert found.qconfig.weight.bits == 3
    assert rows["RTNConfig for everything"].outcome is Outcome.LEFT_OUT
    assert not any("bits = 4" in entry for entry in rows)
    (listed,) = (row for row in from_inc(rtn) if "white_list" in row.entry)
    assert listed.outcome is Outcome.LEFT_OUT
    assert not any("white_list" in row.entry for row in from_inc(rtn | {"white_list": "*"}))
    assert not any("bits = 8" in row.entry for row in from_inc(Config()))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"bits": 4}, "does not say of which class it is.*kind="),
        ({"bits": 9, "use_full_range": True}, "RTNConfig: bits is 9; expected 1 to 8"),
        ({"bits": "4", "use_full_range": True}, 'bits is "4"; expected int'),
        ({"dtype": "int4x", "use_full_range": True}, "dtype is 'int4x'; expected int"),
        ({"dtype": "bf8"}, "dtype is 'bf8'; expected bf16"),
        ({"dtype": "fp32", "use_full_range": False}, "everything in float"),
        ({"iters": 1, "bits": "4"}, 'AutoRoundConfig: bits is "4"; expected int'),
        ({"iters": 1, "act_bits": "8"}, 'act_bits is "8"; expected int'),
        ({"iters": 1, "dtype": 5}, "dtype is 5; expected str"),
        ({"iters": 1, "scheme": {"bits": None}}, "scheme: bits is null; expected 2 to 8"),
        ({"iters": 1, "scheme": {"group_size": "x"}}, 'scheme: group_size is "x"; expected int'),
        ({"scheme": "GGUF:Q4_0"}, "scheme is 'GGUF:Q4_0'; expected one of W4A16"),
        ({"local": {"(": {"use_double_quant": False}}}, "no regular expression"),
        ({"rtn": 3}, "rtn is 3; expected an object"),
        ({}, "does not say"),
    ],
)
def test_mistakes_are_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        from_inc(data)


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="did you mean GPTQConfig"):
        from_inc({"bits": 4}, kind="GPTConfig")
    with pytest.raises(InvalidConfig, match="cannot read the configuration"):
        from_inc(tmp_path / "none.json")
    with pytest.raises(InvalidConfig, match="no configuration of Intel Neural Compressor"):
        from_inc(3)  # type: ignore[arg-type]


def test_the_command_writes_what_quantize_reads(tmp_path: Path) -> None:
    out = tmp_path / "q.yaml"
    text = run("migrate", str(DATA / "rtn.json"), "--out", str(out)).stdout
    assert "u4 affine per-group(32)" in text
    assert f"torch-quant quantize MODEL --config {out}" in text
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 80
    read, found = Quantizer.from_config(out), from_inc(DATA / "rtn.json")
    assert read.qconfig == found.qconfig
    assert read.qconfig.input is FLOAT
    assert read.overrides == dict(found.overrides)
    assert read.module_filter == found.module_filter
    assert (
        "--overwrite" in run("migrate", str(DATA / "rtn.json"), "--out", str(out), expect=2).stderr
    )
    absent = str(tmp_path / "no" / "x.yaml")
    assert "mkdir -p" in run("migrate", str(DATA / "rtn.json"), "--out", absent, expect=2).stderr
    local = {"w_dtype": "int8", "act_dtype": "uint8"}  # ranges for one layer alone
    two = {"rtn": {"global": {"bits": 4}, "local": {}}, "static_quant": {"local": {"2": local}}}
    (tmp_path / "two.json").write_text(json.dumps(two))
    told = run("migrate", str(tmp_path / "two.json"), "--out", str(tmp_path / "two.yaml")).stdout
    assert "--data DATA" in told
    rows = data_of("migrate", str(DATA / "gptq.json"))["rows"]
    assert {row["outcome"] for row in rows} == {"same", "differs", "left out"}
    (tmp_path / "short.json").write_text('{"bits": 4}')
    assert "kind=" in run("migrate", str(tmp_path / "short.json"), expect=2).stderr
    assert data_of("migrate", str(tmp_path / "short.json"), "--kind", "RTNConfig")["out"] is None
