"""The report of a sensitivity analysis: to read, to keep and to look at."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import calibrated
from models import MODELS, example
from torch import nn

from torch_quant import InvalidConfig, Quantizer, Sensitivity, sqnr
from torch_quant.amp.gram import NoiseGram
from torch_quant.amp.proxy import AmpModel
from torch_quant.amp.ranking import Ranking
from torch_quant.amp.report import SensitivityReport

Analysed = tuple[nn.Module, Quantizer, AmpModel]


@pytest.fixture(scope="module", params=["output", "sqnr", "loss"])
def analysed(request: pytest.FixtureRequest) -> Analysed:
    with torch.no_grad():
        model = MODELS["small_cnn"]()
        quantizer = calibrated(model, [(example("small_cnn", 16), {})], backend="reference")
        options: dict[str, Any] = {"metric": request.param}
        if request.param == "loss":
            options = {"loss_fn": lambda outputs, batch: outputs.square().mean()}
        amp_model = quantizer.amp(model, **options)
        for batch in (8, 16):
            amp_model(*example("small_cnn", batch))
    return model, quantizer, amp_model


@pytest.fixture(scope="module")
def report(analysed: Analysed) -> SensitivityReport:
    _, quantizer, amp_model = analysed
    with torch.no_grad():
        return quantizer.sensitivity(amp_model, measure=[0, 2])


def site(name: str, score: float, **options: Any) -> Sensitivity:
    values: dict[str, Any] = {
        "op": "linear",
        "gain": score,
        "local_sqnr": 31.4,
        "predicted_output_sqnr": 27.2,
        "weight_share": 0.25,
        "activation_share": 0.75,
        "macs": 10,
        "bytes": 2048,
    }
    return Sensitivity(name=name, score=score, **values | options)


def made(sites: list[Sensitivity], metric: str = "output", **options: Any) -> SensitivityReport:
    scores = torch.tensor([s.score for s in sites], dtype=torch.float64)
    effects = {s.name: row for s, row in zip(sites, scores.sqrt().diag(), strict=True)}
    gram = NoiseGram.of(effects, len(sites))
    ranking = Ranking(sites, metric, gram, 1000.0, 4, "a note to read")
    return SensitivityReport(ranking, **options)


def three(**options: Any) -> SensitivityReport:
    sites = [
        site("first", 6.0),
        site("second", 3.0, macs=30, fallen_back=True),
        site("third", 1.0, bytes=0),
    ]
    return made(sites, **options)


# ---- text


def test_the_text_has_every_site_and_its_numbers(report: SensitivityReport) -> None:
    text = str(report)
    lines = text.splitlines()
    total = sum(each.score for each in report)
    for rank, each in enumerate(report, 1):
        (line,) = (line for line in lines if line.split()[1:2] == [each.name])
        assert line.split()[0] == str(rank)
        assert f"{each.local_sqnr:.1f}" in line
        assert f"{each.weight_share:.0%}" in line
        wanted = f"{each.score:.3g}" if report.metric == "sqnr" else f"{each.score / total:.1%}"
        assert wanted in line.split()
    assert f"{len(report)} sites ranked by" in text
    assert "from 2 batches" in text
    first, second = report.measured[0], report.measured[2]
    assert f"measured: {first:.1f} with 0, {second:.1f} with 2 in float" in text
    assert ("predicted output SQNR" in text) == (report.metric == "output")


def test_a_table_of_known_numbers() -> None:
    text = str(three())
    rows = {line.split()[1]: line.split() for line in text.splitlines() if "linear" in line}
    assert rows["first"][2:] == ["linear", "60.0%", "27.2", "31.4", "25%", "20.0%", "2"]
    assert rows["second"][2:] == [
        *("linear", "30.0%", "27.2", "31.4", "25%", "60.0%", "2", "in", "float")
    ]
    assert rows["third"][2:] == ["linear", "10.0%", "27.2", "31.4", "25%", "20.0%"]
    assert "20.0 dB with all of them quantized, 24.0 with 1 of the worst in float" in text
    assert text.endswith("a note to read")


def test_long_tables_are_cut() -> None:
    sites = [site(f"layer{i:02d}", float(100 - i)) for i in range(40)]
    text = str(made(sites))
    assert "layer24" in text
    assert "layer25" not in text
    assert "... and 15 more" in text
    assert "layer39" in str(made(sites, rows=40))


def test_a_report_of_nothing() -> None:
    empty = SensitivityReport(Ranking([], "output", NoiseGram(), 0.0, 1, "no site ran"))
    assert "0 sites" in str(empty)
    assert "no site ran" in str(empty)


def test_scores_of_zero() -> None:
    text = str(made([site("first", 0.0), site("second", 0.0)]))
    assert "0.0%" in text
    assert "nan" not in text


# ---- the curve


def test_the_curve_of_independent_noises_never_falls() -> None:
    values = [value for _, value in three().curve()]
    assert values == sorted(values)
    assert len(values) == 4
    assert values[0] == pytest.approx(20.0)
    assert values[-1] == math.inf


def test_measured_points_are_quantized_runs(analysed: Analysed, report: SensitivityReport) -> None:
    model, quantizer, amp_model = analysed
    assert set(report.measured) == {0, 2}
    for count, value in report.measured.items():
        other = Quantizer("reference")
        names = [name for names in report.groups[:count] for name in names]
        fallen = dict.fromkeys(names, "float32")
        other.load_state_dict(quantizer.state_dict() | {"fallback": fallen})
        other.calib(model, example_inputs=example("small_cnn", 8))
        quant_model = other.quantize(model)
        kept = [args for args, _, _ in amp_model.samples]
        expected = sqnr([model(*x) for x in kept], [quant_model(*x) for x in kept])
        assert value == pytest.approx(expected, abs=0.01)  # the same runs
    assert quantizer.fallen_back == {}


def test_measure_true_picks_some_counts(analysed: Analysed) -> None:
    _, quantizer, amp_model = analysed
    found = quantizer.sensitivity(amp_model, measure=True)
    assert set(found.measured) == {k for k in (0, 1, 2, 3, 5) if k < len(found.groups)}
    assert quantizer.sensitivity(amp_model).measured == {}
    everything = quantizer.sensitivity(amp_model, measure=[len(found.groups)])
    assert everything.measured[len(found.groups)] > 100.0  # float, up to folded batch norms


# ---- files


def test_json_has_everything(report: SensitivityReport, tmp_path: Path) -> None:
    report.to_json(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    data = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert data == json.loads(json.dumps(report.to_dict()))
    assert data["metric"] == report.metric
    assert data["batches"] == 2
    assert [each["name"] for each in data["sites"]] == report.names
    for each, found in zip(report, data["sites"], strict=True):
        assert found["score"] == each.score
        assert found["macs"] == each.macs
        assert found["local_sqnr"] == each.local_sqnr
        assert tuple(found["together"]) == each.together
    assert data["groups"] == [list(names) for names in report.groups]
    assert [point["in float"] for point in data["curve"]] == list(range(len(report.groups) + 1))
    assert data["curve"][2]["measured"] == report.measured[2]
    if report.metric == "output":
        assert data["curve"][0]["predicted"] == report.predicted()
    else:
        assert all(point["predicted"] is None for point in data["curve"])


def test_csv_has_a_line_for_each_site(report: SensitivityReport, tmp_path: Path) -> None:
    report.to_csv(tmp_path / "report.csv")
    with open(tmp_path / "report.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == report.names
    for each, row in zip(report, rows, strict=True):
        assert float(row["score"]) == each.score
        assert float(row["local_sqnr"]) == each.local_sqnr
        assert int(row["bytes"]) == each.bytes
        assert row["fallen_back"] == "False"
        assert tuple(row["together"].split()) == each.together


def test_infinite_decibels_are_no_numbers(tmp_path: Path) -> None:
    found = made([site("first", 0.0, local_sqnr=math.inf, predicted_output_sqnr=math.inf)])
    found = SensitivityReport(found, {0: math.inf})
    found.to_json(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_an_empty_report_is_saved_too(tmp_path: Path) -> None:
    empty = SensitivityReport(Ranking([], "output", NoiseGram(), 0.0, 1))
    empty.to_json(tmp_path / "report.json")
    empty.to_csv(tmp_path / "report.csv")
    assert len((tmp_path / "report.csv").read_text(encoding="utf-8").splitlines()) == 1


WRITERS: dict[str, Callable[[SensitivityReport, Path], Any]] = {
    "json": lambda found, path: found.to_json(path),
    "csv": lambda found, path: found.to_csv(path),
    "png": lambda found, path: found.plot(path),
}
PLOT = "plotting needs matplotlib: pip install matplotlib"


@pytest.mark.parametrize("kind", WRITERS)
def test_an_unwritable_path_leaves_nothing(kind: str, tmp_path: Path) -> None:
    if kind == "png":
        pytest.importorskip("matplotlib", reason=PLOT)
    target = tmp_path / "missing" / f"report.{kind}"
    with pytest.raises(InvalidConfig, match=r"cannot write .*missing.*give a writable folder"):
        WRITERS[kind](three(), target)
    assert list(tmp_path.iterdir()) == []
    folder = tmp_path / f"folder.{kind}"
    folder.mkdir()
    with pytest.raises((InvalidConfig, OSError)):
        WRITERS[kind](three(), folder)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("kind", WRITERS)
def test_files_are_replaced_whole(kind: str, tmp_path: Path) -> None:
    if kind == "png":
        pytest.importorskip("matplotlib", reason=PLOT)
    path = tmp_path / f"report.{kind}"
    path.write_text("old " * 100_000)
    WRITERS[kind](three(), path)
    assert b"old" not in path.read_bytes()
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o044  # others may read it
    WRITERS[kind](three(), os.fspath(path))  # a name will do


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_failure_in_the_middle_keeps_the_old_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"report.{kind}"
    path.write_text("old")
    broken = three()
    broken._sites.append(site("no number", 0.0, macs=object()))
    broken._sites.append(object())  # type: ignore[arg-type]
    with pytest.raises((TypeError, AttributeError)):
        WRITERS[kind](broken, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---- plots


def test_a_plot_is_an_image_with_something_on_it(report: SensitivityReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason=PLOT)
    from matplotlib.image import imread

    report.plot(tmp_path / "report.png")
    pixels = imread(tmp_path / "report.png")
    height, width, _ = pixels.shape
    assert height > 300
    assert width > 1000
    left, right = pixels[:, : width // 2], pixels[:, width // 2 :]
    for half in (left, right):
        colours = {tuple(rgb) for rgb in half[::3, ::3, :3].reshape(-1, 3).round(2).tolist()}
        assert len(colours) > 3
        share = float((half[..., :3] < 0.99).any(-1).mean())
        assert 0.001 < share < 0.9


def test_what_the_bars_and_the_curve_show() -> None:
    figure = pytest.importorskip("matplotlib.figure", reason=PLOT).Figure()
    bars, curve = figure.subplots(1, 2)
    found = three(measured={0: 19.0, 2: 33.0, 3: math.inf})
    found.plot_bars(bars)
    activation, weight = bars.containers
    assert [bar.get_width() for bar in activation] == pytest.approx([45.0, 22.5, 7.5])
    assert [bar.get_width() for bar in weight] == pytest.approx([15.0, 7.5, 2.5])
    labels = [label.get_text() for label in bars.get_yticklabels()]
    assert labels == ["first", "second (in float)", "third"]
    found.plot_curve(curve)
    predicted, measured = curve.get_lines()
    assert list(predicted.get_xdata()) == [0, 1, 2]
    assert list(predicted.get_ydata()) == pytest.approx([20.0, 10.0 * math.log10(250.0), 30.0])
    assert list(measured.get_xdata()) == [0, 2]
    assert list(measured.get_ydata()) == [19.0, 33.0]


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_other_formats(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason=PLOT)
    figure = three().plot(tmp_path / f"report.{suffix}")
    start = (tmp_path / f"report.{suffix}").read_bytes()[:200]
    assert (b"<?xml" if suffix == "svg" else b"%PDF") in start
    assert len(figure.axes) == 2


def test_plots_of_many_and_of_no_sites(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason=PLOT)
    long = "encoder.layer." * 9
    many = made([site(f"{long}{i}", float(i)) for i in range(100)])
    figure = many.plot(sites=10)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == 10
    assert labels[0].startswith("...")
    assert labels[0].endswith(".99")
    assert max(map(len, labels)) <= 48
    SensitivityReport(Ranking([], "output", NoiseGram(), 0.0, 1)).plot(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0
