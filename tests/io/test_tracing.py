"""Files of models whose Python code decides something: right, or refused with the line."""

from __future__ import annotations

import inspect
import linecache
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import calibrated
from models import normal
from torch import Tensor, nn

from torch_quant import InvalidConfig, export_torchscript


class Pieces(nn.Module):
    """Two layers with Python code between them, which the subclasses write."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("flag", torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:  # never, but it keeps the model from being one graph
            return x
        return self.second(self.between(self.first(x)))

    def between(self, x: Tensor) -> Tensor:
        return x


DECISIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {}


def decision(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    DECISIONS[function.__name__] = function
    return function


@decision
def branch(self: Any, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x  # here


@decision
def item(self: Any, x: Tensor) -> Tensor:
    return x * x.abs().max().item()  # here


@decision
def integer(self: Any, x: Tensor) -> Tensor:
    return x * int(x.abs().max())  # here


@decision
def real(self: Any, x: Tensor) -> Tensor:
    return x * float(x[0, 0])  # here


@decision
def count(self: Any, x: Tensor) -> Tensor:
    for _ in range((x[0] > 0).sum()):  # here
        x = x + 1
    return x


@decision
def loop_over_found_rows(self: Any, x: Tensor) -> Tensor:
    for row in (x[:, 0] > 0).nonzero():  # here
        x = x + x[row]
    return x


@decision
def number_of_found_rows(self: Any, x: Tensor) -> Tensor:
    found = x[x[:, 0] > 0]
    return x + 1 if found.shape[0] > 2 else x  # here


@decision
def length_of_found_rows(self: Any, x: Tensor) -> Tensor:
    return x + len(x[x[:, 0] > 0])  # here


@decision
def values_as_list(self: Any, x: Tensor) -> Tensor:
    return x * max(x[0].tolist())  # here


@decision
def values_as_array(self: Any, x: Tensor) -> Tensor:
    return x * float(x.numpy().max())  # here


@decision
def text(self: Any, x: Tensor) -> Tensor:
    return x + len(f"{x[0, 0]:.3f}")  # here


@decision
def shown(self: Any, x: Tensor) -> Tensor:
    return x + len(str(x.sum()))  # here


@decision
def comparison(self: Any, x: Tensor) -> Tensor:
    return x + 1 if torch.equal(x, x.relu()) else x  # here


@decision
def membership(self: Any, x: Tensor) -> Tensor:
    return x + 1 if 0.0 in x else x  # here


@decision
def constant_of_a_value(self: Any, x: Tensor) -> Tensor:
    return x * torch.tensor([x[0, 0], 1.0]).sum()  # here


@decision
def written_in_place(self: Any, x: Tensor) -> Tensor:
    memory = torch.zeros(8)
    memory[0] = x[0, 0]
    return x if memory[0] > 0 else -x  # here


@decision
def written_to_a_view(self: Any, x: Tensor) -> Tensor:
    memory = torch.zeros(2, 8)
    memory[0].copy_(x[0])
    return x if memory.sum() > 0 else -x  # here


@decision
def kept_in_a_buffer(self: Any, x: Tensor) -> Tensor:
    self.seen.copy_(x.amax())
    return x if self.seen > 0 else -x  # here


@decision
def raises(self: Any, x: Tensor) -> Tensor:
    if x.isnan().any():  # here
        raise ValueError("not a number")
    return x


HARMLESS: dict[str, Callable[[Any, Tensor], Tensor]] = {}


def harmless(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    HARMLESS[function.__name__] = function
    return function


@harmless
def constant_buffer(self: Any, x: Tensor) -> Tensor:
    return x + 1 if self.flag > 0 else x


@harmless
def weight(self: Any, x: Tensor) -> Tensor:
    return x * self.first.weight.abs().max().item()


@harmless
def made_of_a_size(self: Any, x: Tensor) -> Tensor:
    return x + torch.arange(x.shape[0])[:, None] / x.shape[0]


@harmless
def where(self: Any, x: Tensor) -> Tensor:
    return torch.where(x.sum() > 0, x, -x)


@harmless
def found_rows(self: Any, x: Tensor) -> Tensor:
    found = x[x[:, 0] > 0]
    return x + found.sum(0) / found.shape[0]


@harmless
def cut_at_a_value(self: Any, x: Tensor) -> Tensor:
    return x + x[: (x[:, 0] > 0).sum()].sum(0)


@harmless
def like_it(self: Any, x: Tensor) -> Tensor:
    return x + 1 if x.new_zeros(3).sum() == 0 and torch.ones_like(x).all() else x


def quantized(between: Callable[[Any, Tensor], Tensor], forward: Any = None) -> nn.Module:
    cls = type("Made", (Pieces,), {"between": between} | ({"forward": forward} if forward else {}))
    torch.manual_seed(0)
    model = cls().eval()
    return calibrated(model, [((normal(16, 8),), {})], backend="reference").quantize(model)


def _without_branch(self: Any, x: Tensor) -> Tensor:
    """In pieces without a branch of its own."""
    if self.seen.item() > 1e9:
        return x
    return self.second(self.between(self.first(x)))


@pytest.mark.parametrize("name", DECISIONS)
def test_a_decision_by_values_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    function = DECISIONS[name]
    lines, start = inspect.getsourcelines(function)
    number = start + next(i for i, line in enumerate(lines) if "# here" in line)
    text = linecache.getline(__file__, number).strip()
    model = quantized(function, _without_branch)
    with pytest.raises(InvalidConfig, match="reads what a tensor holds") as caught:
        export_torchscript(model, normal(4, 8), tmp_path / "m.ts")
    assert f"{__file__}:{number} ({text})" in str(caught.value)
    assert "torch_quant.save(quant_model, folder)" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_not_depend_on_values_is_written(name: str, tmp_path: Path) -> None:
    model = quantized(HARMLESS[name], _without_branch)
    export_torchscript(model, normal(4, 8), tmp_path / "m.ts")
    loaded = torch.jit.load(tmp_path / "m.ts")
    for batch in (4, 7, 2):
        for sign in (1, -1):
            x = sign * normal(batch, 8, salt=batch).abs()
            torch.testing.assert_close(loaded(x), model(x))


def test_the_branch_that_the_example_does_not_take(tmp_path: Path) -> None:
    """The file would give the other branch's value."""
    model = quantized(Pieces.between)
    with pytest.raises(InvalidConfig, match=r"test_tracing\.py:\d+ \(if x\.sum\(\) > 1e9"):
        export_torchscript(model, normal(4, 8), tmp_path / "m.ts")


def test_the_quantized_model_itself_can_be_saved(tmp_path: Path) -> None:
    """What the message advises."""
    torch.manual_seed(0)
    model = Pieces().eval()
    x = normal(16, 8)
    quant_model = calibrated(model, [((x,), {})]).quantize(model)
    torch.save(quant_model, tmp_path / "m.pt")
    loaded = torch.load(tmp_path / "m.pt", weights_only=False)
    for each in (x, x + 1e9):
        assert torch.equal(loaded(each), quant_model(each))


def test_a_number_read_inside_of_a_graph(tmp_path: Path) -> None:
    """``torch.export`` keeps it as an operator, which a trace does not."""

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, length: Tensor) -> Tensor:
            steps = torch.arange(8)
            return self.linear(x) * (steps < length.max().item())

    model = Cut().eval()
    inputs = (normal(16, 8), torch.full((16,), 5))
    quant_model = calibrated(model, [(inputs, {})], backend="reference").quantize(model)
    assert len(quant_model.graphs) == 1
    with pytest.raises(InvalidConfig, match=r"test_tracing\.py:\d+ \(return self\.linear\(x\)"):
        export_torchscript(quant_model, inputs, tmp_path / "m.ts")


def test_a_decision_by_sizes_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def by_size(self: Any, x: Tensor) -> Tensor:
        return x + 1 if x.shape[0] > 3 else x

    model = quantized(by_size, _without_branch)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        export_torchscript(model, normal(4, 8), tmp_path / "m.ts")
    assert "return x + 1 if x.shape[0] > 3 else x" in caplog.text


class BySize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 1 if x.shape[1] > 3 else self.linear(x)


@pytest.mark.parametrize(("length", "told"), [(4, True), (3, True), (9, True), (40, False)])
def test_a_branch_on_a_size_inside_of_a_graph_is_told(
    length: int, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = BySize().eval()
    x = normal(2, length, 8)
    quant_model = calibrated(model, [((x,), {})], backend="reference").quantize(model)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        export_torchscript(quant_model, x, tmp_path / "m.ts")
    sizes = "is right where" in caplog.text
    assert sizes == told  # 40 is far from the branch
    if told:
        assert "x.shape[1]" in caplog.text
        assert "3" in caplog.text.partition("is right where")[2]


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    for each in (nn.Linear(8, 8), torch.relu, None):
        with pytest.raises(InvalidConfig, match=r"expected a quantized model, got .*quantize\(mod"):
            export_torchscript(each, normal(4, 8), tmp_path / "m.ts")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
