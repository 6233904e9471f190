"""The report of a model: what its data say, the page, the figures, and what is refused."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from report_models import EVIL, Known
from thinning import LONG
from torch import Tensor, nn

from torch_quant import InvalidConfig, NotCalibrated, QConfig, Quantizer, recipes
from torch_quant.report import whole
from torch_quant.report.comparison import Comparison
from torch_quant.report.page import page
from torch_quant.report.whole import ModelReport
from torch_quant.reporting.distributions import BINS

PLOT = "plotting needs matplotlib: pip install matplotlib"


@pytest.fixture(scope="module")
def known() -> Known:
    return Known()


def test_it_says_what_coverage_says(known: Known) -> None:
    coverage = known.quantizer.coverage(known.model)
    data = known.report.data
    assert data["coverage"] == pytest.approx(coverage.share, rel=1e-5)
    assert data["by_op"] == coverage.by_op()
    assert [each["name"] for each in known.layers] == [*coverage.plan]
    reasons = {each["name"]: each["reason"] for each in known.layers if not each["quantized"]}
    assert reasons == coverage.reasons
    assert {each["why"] for each in known.layers} == {"", "float", "fallen back"}
    assert sum(each["share"] for each in known.layers) == pytest.approx(1.0, abs=1e-4)


def test_it_says_what_compare_and_sensitivity_say(known: Known) -> None:
    found: Comparison = known.quantizer.compare(known.model, known.batches[:2])
    errors = {each["name"]: each["error"] for each in known.layers if each["error"]}
    assert list(errors) == [each.site for each in found]
    for each in found:
        after = "inf" if each.after == math.inf else pytest.approx(each.after, rel=1e-4)
        assert errors[each.site]["after"] == after
        assert errors[each.site]["adds"] == pytest.approx(each.share, rel=1e-4, abs=1e-9)
    assert known.report.data["comparison"]["outputs"] == pytest.approx(found.outputs, rel=1e-4)
    ranking = known.quantizer.sensitivity(known.amp_model)
    total = sum(each.score for each in ranking)
    shares = {each["name"]: each["sensitivity"] for each in known.layers if each["sensitivity"]}
    assert {*shares} == {each.name for each in ranking}
    for each in ranking:
        assert shares[each.name]["share"] == pytest.approx(each.score / total, rel=1e-4, abs=1e-9)


def test_grids_are_those_of_calibration_and_counts_are_whole(known: Known) -> None:
    plan, state = known.quantizer.plan, known.quantizer.state
    checked = 0
    for layer in known.layers:
        for found in layer["inputs"]:
            assert layer["quantized"]
            key = next(k for k in plan[layer["name"]].inputs if k.endswith(found["tensor"]))
            spec = plan[layer["name"]].activation
            assert spec is not None
            assert sum(found["histogram"]["counts"]) > 0
            assert len(found["histogram"]["counts"]) <= BINS
            if found["behind"]:
                continue  # SmoothQuant moved it, and its grid follows from other statistics
            checked += 1
            qparams = state.qparams(key, spec)
            assert found["grid"]["scale"] == pytest.approx(float(qparams.scale), rel=1e-5)
            assert found["grid"]["zero_point"] == float(qparams.zero_point)
            low, high = found["seen"]
            assert found["grid"]["low"] <= low + found["grid"]["scale"]
            assert found["grid"]["high"] >= high - found["grid"]["scale"]
            assert found["clipped"] < 0.005  # values of the quantized model may lie a bit beyond
    assert checked
    first = known.report.layer("body.0")["inputs"][0]
    assert sum(first["histogram"]["counts"]) == sum(x.numel() for x in known.batches[:2])
    assert first["counted"] == "batches"


def test_weights_are_counted_by_code(known: Known) -> None:
    quantized = known.quantizer.quantize(known.model)
    weight = known.report.layer("head")["weight"]
    codes, scale = (quantized.state_dict()[f"head.weight{end}"] for end in ("", "_scale"))
    assert sum(weight["codes"]["counts"]) == codes.numel()
    assert weight["used"] == codes.unique().numel()
    assert weight["shape"] == list(codes.shape)
    assert weight["scale"][0] == pytest.approx(float(scale.min()), rel=1e-5)
    assert weight["scale"][-1] == pytest.approx(float(scale.max()), rel=1e-5)
    assert known.report.layer("body.2")["weight"] is None


class Near(nn.Module):
    """What is left of a layer beside its own float results, which one batch gives to the bit."""

    def __init__(self, x: Tensor, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.then = nn.Linear(16, 16), then
        self.register_buffer("known", self.inner(x).detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.inner(x) - self.known)


@pytest.mark.parametrize(
    ("then", "word", "shown"),
    [
        (lambda x: torch.sqrt(x + 1e-5), "nan", "not a number"),
        (torch.relu, "-inf", "no signal"),
    ],
    ids=["nan", "no signal"],
)
def test_outputs_without_decibels_are_not_equal(
    then: Callable[[Tensor], Tensor], word: str, shown: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    model = Near(x, then).eval()
    assert bool(model(x).isfinite().all())
    quantizer = Quantizer("reference")
    quantizer.calib(model)(x)
    report = quantizer.report(None, model, [x])
    found = report.data["comparison"]
    assert (found["outputs"], found["simulated"], found["equal"]) == (word, word, False)
    assert shown in str(report)
    assert "equal" not in str(report)
    assert ModelReport(json.loads(json.dumps(report.data))).facts() == report.facts()
    lines = str(quantizer.compare(model, [x])).splitlines()
    assert lines[0].endswith(f"SQNR {shown}")
    assert lines[1].endswith(f"arithmetic: {shown}")


def test_batches_of_nan_are_not_equal() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    quantizer = Quantizer("reference")
    quantizer.calib(model)(x)
    nothing = torch.full_like(x, math.nan)
    report = quantizer.report(None, model, [nothing])
    assert [each["error"]["after"] for each in report.data["layers"]] == ["nan", "nan"]
    assert [each["error"]["adds"] for each in report.data["layers"]] == [0.0, 0.0]
    assert "not a number" in str(report)
    found = quantizer.compare(model, [x, nothing])  # what can be compared is
    assert all(20.0 < each.after < 80.0 for each in found)


def test_metrics_may_be_infinite_and_of_any_number(known: Known, tmp_path: Path) -> None:
    metrics: Any = {
        "perplexity": (torch.tensor(8.5), math.inf),
        "loss": (torch.linspace(0, 1, 3).numpy()[1], math.nan),
    }
    report = known.quantizer.report(tmp_path / "page.html", known.model, metrics=metrics)
    assert report.data["metrics"] == [
        {"name": "perplexity", "float": 8.5, "quantized": "inf"},
        {"name": "loss", "float": 0.5, "quantized": "nan"},
    ]
    assert [[*row.values()] for row in report.facts()[-2:]] == [
        ["perplexity", "8.5", "inf"],
        ["loss", "0.5", "nan"],
    ]
    for wrong in (True, torch.ones(2), 1j, 10**400):
        with pytest.raises(InvalidConfig, match="expected name -> "):
            known.quantizer.report(metrics={"loss": (0.5, wrong)})  # type: ignore[dict-item]


def test_the_page_has_words_for_what_is_no_number() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node to run the page's functions: apt-get install nodejs")
    web = Path(whole.__file__).parent / "web"
    base, start = ((web / name).read_text(encoding="utf-8") for name in ("base.js", "start.js"))
    functions = base.partition("/** Round places")[0]
    functions += re.findall("^const exact = .*$", start, re.M)[0]
    code = (
        'const document = {getElementById: () => ({textContent: "{}"})};'
        f"{functions}\nconst all = [21.26, 'inf', '-inf', 'nan', null];"
        "console.log(JSON.stringify([decibels, short, exact].map((each) => all.map(each))))"
    )
    ran = subprocess.run([node, "-e", code], capture_output=True, text=True, check=True)
    shown, _, metrics = json.loads(ran.stdout)
    assert shown == ["21.3 dB", "equal", "no signal", "not a number", "\u2013"]
    assert metrics[:4] == ["21.26", "inf", "-inf", "nan"]


def test_titles_that_no_file_can_hold_are_mended(known: Known, tmp_path: Path) -> None:
    title = f"run {chr(0xDC80)}"
    report = known.quantizer.report(tmp_path / "page.html", known.model, title=title)
    assert report.data["title"] == "run \ufffd"
    assert "<title>run \ufffd" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert str(report).encode()
    assert page({**report.data, "title": title}).encode()


def test_batches_that_are_none_are_refused(known: Known) -> None:
    for method in ("report", "compare"):
        ask: Any = getattr(known.quantizer, method)
        with pytest.raises(InvalidConfig, match=rf"{method}: batches is of type NoneType; .*\[x\]"):
            ask(model=known.model, batches=None)


def test_a_histogram_of_calibration_needs_no_batches() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3000, 8)
    x[0, 0] = 60.0
    quantizer = Quantizer("reference", qconfig=QConfig(observer="percentile"))
    quantizer.calib(model)(x)
    report = quantizer.report()
    (found,) = report.data["layers"][0]["inputs"]
    assert (found["counted"], found["observer"]) == ("calibration", "percentile")
    assert sum(found["histogram"]["counts"]) == x.numel()
    assert found["clipped"] > 0.0  # the outlier lies beyond the grid
    assert report.data["comparison"] is None
    assert "SQNR" not in str(report)


def test_formats_without_ranges_have_weights_alone() -> None:
    model, x = nn.Sequential(nn.Linear(64, 8)), torch.randn(4, 64)
    quantizer = Quantizer("reference", qconfig=recipes.int4_weight_only(group_size=32))
    report = quantizer.report(model=model, batches=[x])
    (layer,) = report.data["layers"]
    assert layer["inputs"] == []
    assert (layer["weight"]["levels"], layer["weight"]["scales"]) == (16, 16)
    assert len(layer["weight"]["codes"]["counts"]) == 16


class Tied(nn.Module):
    """An embedding and a head that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


def test_a_weight_that_layers_share_is_shown_at_each() -> None:
    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.arange(20)[None]
    quantizer = Quantizer("reference", qconfig=QConfig())
    quantizer.calib(model)(ids)
    report = quantizer.report(batches=[ids])
    assert report.data["notes"] == []
    embed, head = (report.layer(name)["weight"] for name in ("embed", "head"))
    assert embed == head
    assert embed["shape"] == [20, 16]


def test_it_changes_nothing_and_comes_out_the_same_twice(known: Known) -> None:
    x = known.batches[0]
    before = known.quantizer.quantize(known.model)(x)
    settings = known.quantizer.to_config()
    again = known.quantizer.report(
        None, known.model, iter(known.batches[:2]), sensitivity=known.amp_model
    )
    again.data["metrics"] = known.report.data["metrics"]
    assert again.data == known.report.data
    assert torch.equal(known.quantizer.quantize(known.model)(x), before)
    assert known.quantizer.to_config() == settings == known.report.data["settings"]
    assert Quantizer.from_config(known.report.data["settings"]).to_config() == settings


def test_the_page_needs_nothing_from_outside(known: Known, tmp_path: Path) -> None:
    known.report.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text == known.report.to_html()
    text = re.sub(r'id="data">.*?<', "<", text)  # names that look like places are in there
    places = re.findall(r"""(?:https?:|src=|href=|@import|url\()[^\s>"']*["']?[^\s>"']*""", text)
    known_ones = ('href="data:,', 'href="#layers', "http://www.w3.org/2000/svg")
    assert all(each.startswith(known_ones) for each in places), places
    assert len(places) == 3
    assert {each.name for each in tmp_path.iterdir()} == {"report.html"}


def test_names_of_a_model_are_text(known: Known) -> None:
    text = page({**known.report.data, "title": f'{EVIL} "{{{{data}}}}"'})
    assert "<img" not in text
    assert text.count("</script>") == 2
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert EVIL in [each["name"] for each in json.loads(block)["layers"]]
    assert "<img" not in known.quantizer.coverage(known.model)._repr_html_()


def test_reports_are_tables_in_notebooks(known: Known) -> None:
    comparison = known.quantizer.compare(known.model, known.batches[:1])
    ranking = known.quantizer.sensitivity(known.amp_model)
    coverage = known.quantizer.coverage(known.model)
    for each in (comparison, ranking, coverage, known.report):
        shown = each._repr_html_()
        assert "<table>" in shown
        assert "<img" not in shown
    assert "head" in comparison._repr_html_()
    assert "&lt;img" in ranking._repr_html_()
    assert "left in float by an override" in coverage._repr_html_()
    assert "0.75" in known.report._repr_html_()


def test_the_data_alone_can_be_kept(known: Known, tmp_path: Path) -> None:
    known.report.save(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert read == known.report.to_dict()
    assert ModelReport(read).to_html() == known.report.to_html()


def test_paths_that_cannot_be_written_are_refused_before_any_work(tmp_path: Path) -> None:
    quantizer, untouched = Quantizer("reference"), nn.Linear(2, 2)
    for path, message in (
        (tmp_path, "it is a folder; give a file in it, as .*report.html"),
        (tmp_path / "none" / "report.html", "there is no folder .*none"),
        (tmp_path / "report.pdf", "expected a name that ends in .html"),
        ("", "as \"report.html\""),
    ):  # fmt: skip
        with pytest.raises(InvalidConfig, match=message):
            quantizer.report(path, untouched)
    if sys.platform != "win32" and os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(InvalidConfig, match="may not be written to"):
            quantizer.report(tmp_path / "report.html", untouched)


def test_what_is_missing_is_said(known: Known, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="no model was captured by this quantizer"):
        Quantizer("reference").report()
    model = nn.Linear(2, 2)
    with pytest.raises(NotCalibrated, match=r"quantizer\.calib\(model\)"):
        Quantizer("reference").report(model=model, batches=[torch.ones(1, 2)])
    known.quantizer.save(tmp_path / "kept")
    loaded = Quantizer.load(tmp_path / "kept")
    with pytest.raises(
        NotCalibrated, match=r"quantizer\.report\(path, model, batches=\[\.\.\.\]\)"
    ):
        loaded.report(None, known.model)
    assert len(loaded.report(None, known.model, known.batches[:1]).data["layers"]) == 6
    report = known.quantizer.report
    with pytest.raises(InvalidConfig, match="the file comes first, and then the model"):
        report(known.model)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="expected name -> "):
        report(metrics={"accuracy": 0.5})  # type: ignore[dict-item]
    with pytest.raises(InvalidConfig, match=r"quantizer\.profile\(model, example_inputs\) returns"):
        report(profile=known.report)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match=r"quantizer\.amp\(model\) makes"):
        report(sensitivity=known.model)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match=r"no layer 'heat'; expected one of body\.0"):
        known.report.layer("heat")


def test_figures_for_notebooks(known: Known, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason=PLOT)
    report = known.report
    file = tmp_path / "head.png" if LONG else None
    assert len(report.plot_layer("head", file).axes) == 2
    assert file is None or file.stat().st_size > 1000
    assert len(report.plot_error().axes) == 2
    bars = report.plot_sensitivity().axes[0].get_yticklabels()
    assert bars[0].get_text() == known.quantizer.sensitivity(known.amp_model)[0].name
    parts = [each.get_text() for each in report.plot_coverage().axes[0].get_yticklabels()]
    assert {"body.0", "head"} <= set(parts)
    drawn = report.plot_ranges().axes[0].lines
    grids = [x["grid"] for each in known.layers for x in each["inputs"]]
    assert [*drawn[-1].get_ydata()] == [grids[-1]["low"], grids[-1]["high"]]
    for draw in (report.plot_error, known.quantizer.sensitivity(known.amp_model).plot):
        with pytest.raises(InvalidConfig, match=r"does not write \.html; expected .*\.pdf"):
            draw(tmp_path / "figure.html")
    assert not (tmp_path / "figure.html").exists()
    lost = {"before": 20.0, "after": "nan", "adds": 1.0}
    first = report.layer("head") | {"error": {"before": "inf", "after": 20.0, "adds": 0.0}}
    half = ModelReport({**report.data, "layers": [first, first | {"error": lost}]})
    assert [*half.plot_error().axes[0].lines[0].get_ydata()] == [20.0]
    with pytest.raises(InvalidConfig, match=r"body.2 has no grid to draw: left in float"):
        report.plot_layer("body.2")
    bare = ModelReport({**report.data, "layers": [report.layer("body.2") | {"error": None}]})
    with pytest.raises(InvalidConfig, match=r"batches=\[\.\.\.\]"):
        bare.plot_error()
