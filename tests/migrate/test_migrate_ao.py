"""Settings of torch.ao, made by torch.ao itself, decide here what they decide there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_quant import InvalidConfig, QConfig, Quantizer, QuantSpec, recipes
from torch_quant.migrate import Migration, Outcome, from_torch_ao

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
ao: Any = pytest.importorskip("torch.ao.quantization")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.emb = nn.Conv2d(1, 4, 3), nn.Embedding(4, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).flatten(2)
        for block in self.blocks:
            y = torch.sigmoid(block(y))
        y = self.head(torch.matmul(y, y.transpose(1, 2)) @ y)
        return y + self.emb(x[:, 0, 0, :1].long()).mean()


def formats(quantizer: Quantizer) -> dict[str, str]:
    model, x = Net(), torch.ones(2, 1, 6, 6)
    quantizer.calib(model)(x)
    quantizer.quantize(model)
    plan = quantizer.plan
    return {name: str(each.activation) if each.quantized else "-" for name, each in plan.items()}


def test_a_mapping_by_names_expressions_classes_and_functions() -> None:
    mapping = (
        ao.get_default_qconfig_mapping("x86")
        .set_global(ao.QConfig(ao.MinMaxObserver, ao.default_per_channel_weight_observer))
        .set_object_type(torch.matmul, None)
        .set_object_type(nn.Conv2d, ao.get_default_qconfig("x86"))
        .set_object_type(nn.Embedding, ao.float_qparams_weight_only_qconfig)
        .set_module_name_regex("blocks.*", ao.default_dynamic_qconfig)
        .set_module_name_regex("blocks.1", None)  # there, the first that matches holds
        .set_module_name("head", None)
        .set_module_name_object_type_order("head", torch.matmul, 1, None)
    )
    found = from_torch_ao(mapping)
    assert formats(found.quantizer(backend="reference")) == {
        "stem": "u7 affine per-tensor",
        "blocks.0": "u8 affine per-token, dynamic",
        "blocks.1": "u8 affine per-token, dynamic",
        "matmul": "-",
        "matmul_1": "-",
        "head": "-",
        "emb": "None",
    }
    assert found.overrides["class:torch.nn.Conv2d"].observer == "histogram"
    rows = {row.entry: row for row in found}
    assert rows["head, matmul, 1"].outcome is Outcome.LEFT_OUT
    (others,) = (row for row in found if row.outcome is Outcome.NO_EFFECT)
    assert "Sigmoid" in others.entry
    whole = from_torch_ao(ao.get_default_qconfig_mapping("x86"))
    (alike,) = (row for row in whole if row.here == "as everything else")
    assert "ConvTranspose2d" in alike.entry
    read = Quantizer.from_config(found.to_config())
    assert read.overrides == dict(found.overrides)


class Own(nn.Linear):
    """A layer of the user's."""


class Holder(nn.Module):
    """A module of the user's that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        return out


def test_functions_are_no_modules_and_classes_of_the_users_are_kept() -> None:
    """A setting for F.linear leaves modules alone; one for an own class is an override."""

    class Local(nn.Linear):
        pass

    mapping = ao.QConfigMapping().set_global(ao.get_default_qconfig("x86"))
    for kind in (nn.functional.linear, Own, Holder, Local, nn.ReLU):
        mapping = mapping.set_object_type(kind, None)
    found = from_torch_ao(mapping)
    outcomes = {row.entry.partition(":")[0]: row.outcome for row in found}
    assert outcomes["linear"] is outcomes["Local"] is Outcome.LEFT_OUT
    assert outcomes["Own"] is Outcome.SAME
    assert outcomes["Holder"] is Outcome.DIFFERS
    (others,) = (row for row in found if row.outcome is Outcome.NO_EFFECT)
    assert others.entry == "types without a product: ReLU"
    model, x = nn.Sequential(nn.Linear(4, 4), Own(4, 4), Holder()), torch.ones(2, 4)
    plan = found.quantizer(backend="reference").coverage(model, x).plan
    assert plan.quantized == ("0",)


def test_what_is_the_same_has_the_same_format() -> None:
    """Activations of 16 bits or small floats are float here, which is said."""
    weight = ao.default_per_channel_weight_observer
    for dtype, expected in (
        (torch.float32, Outcome.SAME),
        (torch.int16, Outcome.DIFFERS),
        (torch.uint16, Outcome.DIFFERS),
        (torch.float8_e4m3fn, Outcome.DIFFERS),
    ):
        source = ao.PlaceholderObserver.with_args(dtype=dtype)
        found = from_torch_ao(ao.QConfig(source, weight))
        (row,) = (row for row in found if row.entry.startswith("activation"))
        assert row.outcome is expected
        rows = {row.outcome for row in from_torch_ao(mixed(source)) if "head" in row.entry}
        assert rows == {expected}


def mixed(activation: Any) -> Any:
    """A mapping in whose head only the activations might be quantized."""
    in_float = ao.PlaceholderObserver.with_args(dtype=torch.float32)
    mapping = ao.QConfigMapping().set_global(ao.get_default_qconfig("x86"))
    return mapping.set_module_name("head", ao.QConfig(activation, in_float))


def test_a_model_with_qconfigs() -> None:
    model = Net()
    model.qconfig = ao.get_default_qat_qconfig("x86")
    model.head.qconfig = None
    found = from_torch_ao(model)
    assert found.qconfig.observer == "moving_average"
    assert found.qconfig.input.quant_max == 127
    assert found.overrides == {"head": None}
    listed = Net()
    listed.head.qconfig = ao.default_qconfig
    only = formats(from_torch_ao(listed).quantizer(backend="reference"))
    assert {name for name, each in only.items() if each != "-"} == {"head"}


def test_a_quantizer_of_pt2e() -> None:
    """Of torch.ao up to torch 2.9, and of torchao behind that."""
    for home in ("torch.ao.quantization.quantizer", "torchao.quantization.pt2e.quantizer"):
        try:
            x86 = __import__(f"{home}.x86_inductor_quantizer", fromlist=["X86InductorQuantizer"])
            break
        except ImportError:
            continue
    else:
        pytest.skip("neither torch.ao's nor torchao's X86InductorQuantizer is installed")
    config = x86.get_default_x86_inductor_quantization_config()
    source = x86.X86InductorQuantizer().set_global(config).set_module_name_qconfig("head", None)
    found = from_torch_ao(source.set_function_type_qconfig(torch.matmul, config))
    assert found.qconfig.observer == "histogram"
    assert set(found.overrides) == {"op:matmul", "head"}
    assert found.overrides["head"] is None


def quantized(found: Migration) -> set[str]:
    return {name for name, x in formats(found.quantizer(backend="reference")).items() if x != "-"}


def test_what_quantize_dynamic_is_given() -> None:
    """Its set stands for the qconfig that torch.ao takes by default; all else stays in float."""
    plain = from_torch_ao({nn.Linear})
    key = "class:torch.nn.Linear"
    assert plain.overrides[key] == QConfig(
        recipes.int8_dynamic().input, QuantSpec.of("int8", per_channel=True)
    )
    assert plain.overrides == from_torch_ao({nn.Linear: ao.default_dynamic_qconfig}).overrides
    linear = {"blocks.0", "blocks.1", "head"}
    assert quantized(plain) == linear
    assert quantized(from_torch_ao({"head": ao.per_channel_dynamic_qconfig})) == {"head"}
    assert quantized(from_torch_ao(frozenset({"blocks"}))) == {"blocks.0", "blocks.1"}
    some = {nn.Linear: ao.default_dynamic_qconfig, "head": None}
    assert quantized(from_torch_ao(some)) == linear - {"head"}
    with pytest.raises(InvalidConfig, match="quantize_dynamic leaves everything in float"):
        from_torch_ao(set())
    with pytest.raises(InvalidConfig, match="leaves everything in float"):
        from_torch_ao({nn.Linear: ao.float16_dynamic_qconfig})


def test_mistakes_are_named() -> None:
    with pytest.raises(InvalidConfig, match="expected a qconfig of torch"):
        from_torch_ao(3)
    with pytest.raises(InvalidConfig, match="no module of Net has a qconfig"):
        from_torch_ao(Net())
    with pytest.raises(InvalidConfig, match="everything in float"):
        from_torch_ao(ao.QConfigMapping())
    wide = ao.QConfig(ao.MinMaxObserver.with_args(dtype=torch.qint32), ao.default_weight_observer)
    with pytest.raises(InvalidConfig, match="codes are qint32; expected 8 bits"):
        from_torch_ao(wide)

    def broken() -> None:
        raise ValueError("no")

    with pytest.raises(InvalidConfig, match="makes no observer: ValueError: no"):
        from_torch_ao(ao.QConfig(broken, ao.default_weight_observer))
