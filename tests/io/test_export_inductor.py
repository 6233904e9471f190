"""Packages of AOTInductor: read without the model, from C++ too; what is refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from commands import entries
from flows import calibrated
from models import normal, seeded
from runtimes import Pieces
from torch import Tensor, nn

from torch_quant import Backend, InvalidConfig, UnsupportedOp, export_inductor
from torch_quant.backends import InductorBackend

MISSING = Backend.INDUCTOR.unavailable()
pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=f"Backend.INDUCTOR: {MISSING}"),
    pytest.mark.newest("ten seconds of a C++ compiler"),
]
SOURCE = Path(__file__).parents[2] / "examples" / "cpp" / "run_package.cpp"


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor, *, ids: Tensor) -> dict[str, Tensor]:
        y = self.second(self.first(x).relu())
        return {"y": y, "picked": y.gather(1, ids % 10)}


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)
        self.register_buffer("n", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.n.add_(0.001)
        return self.layer(x) + self.n


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, about how packages were loaded once
def test_a_package_runs_without_the_model_and_without_python(tmp_path: Path) -> None:
    model, example = seeded(Two), {"x": normal(4, 64), "ids": torch.arange(8).reshape(4, 2)}
    quantizer = calibrated(model, [((), example)], backend="inductor")
    quant_model, file = quantizer.quantize(model), tmp_path / "model.pt2"
    names = export_inductor(quant_model, example, file)
    assert names["outputs"] == ["y", "picked"]
    assert [each.partition(":")[0] for each in names["inputs"]] == ["x", "ids"]
    assert entries(tmp_path) == {"model.pt2"}
    package = torch._inductor.aoti_load_package(str(file))
    assert json.loads(package.get_metadata()["inputs"]) == names["inputs"]
    torch.manual_seed(0)
    x, ids = torch.randn(5, 64), torch.randint(100, (5, 3))
    expected = quant_model.graphs[0].body(x, ids)
    for found, wanted in zip(package(x, ids), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-5)

    folder, program = Path(torch.__file__).parent, tmp_path / "run_package"
    paths = [f"-I{folder / 'include'}", f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}"]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    command = ["g++", "-std=c++20", str(SOURCE), "-o", str(program), *paths, *libraries]
    subprocess.run(command, check=True)
    run = [str(program), str(file), "5x64", "i5x3"]
    told = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    for wanted in expected:
        (total,) = (
            float(line.split("sum ")[1])
            for line in told.splitlines()
            if line.startswith(f"output {list(wanted.shape)} ")
        )
        assert total == pytest.approx(float(wanted.sum()), abs=1e-3)


@pytest.mark.long("ten seconds, of which Inductor's first import takes most")
def test_what_is_refused(tmp_path: Path) -> None:
    model, x = seeded(lambda: nn.Linear(16, 8)), normal(4, 16)
    quantizer = calibrated(model, [((normal(32, 16),), {})], backend="reference")
    quant_model = quantizer.quantize(model)
    with pytest.raises(InvalidConfig, match=r"quantized for reference: quantizer\.quantize"):
        export_inductor(quant_model, x, tmp_path / "model.pt2")
    ready = quantizer.quantize(model, backend="inductor")
    with pytest.raises(InvalidConfig, match=r"packages that end in .pt2"):
        export_inductor(ready, x, tmp_path / "model.onnx")
    backend = InductorBackend(settings={"no_such_setting": True})
    with pytest.raises(UnsupportedOp, match=r"Inductor does not compile it.*no_such_setting"):
        export_inductor(quantizer.quantize(model, backend=backend), x, tmp_path / "model.pt2")
    counts = seeded(Counts)
    counting = calibrated(counts, [((x,), {})], backend="inductor").quantize(counts)
    with pytest.raises(UnsupportedOp, match=r"it writes to n"):
        export_inductor(counting, x, tmp_path / "model.pt2")
    pieces = seeded(Pieces)
    in_pieces = calibrated(pieces, [((x,), {})], backend="inductor").quantize(pieces)
    with pytest.raises(InvalidConfig, match=r"captured in pieces.*cannot be one package"):
        export_inductor(in_pieces, x, tmp_path / "model.pt2")
    assert entries(tmp_path) == set()
