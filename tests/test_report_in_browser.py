"""The page of a report in a real browser, without a network: layout, keyboard, search."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from report_models import EVIL, Known, long_model

from torch_quant import Quantizer

pytestmark = pytest.mark.long("starts a browser")

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
WIDTHS = (400, 1280)
LAYERS = 500


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not BROWSER:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with api.sync_playwright() as started:
        options = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
        found = started.chromium.launch(executable_path=BROWSER, args=options)
        yield found
        found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    Known().report.save(path)
    return path


@pytest.fixture(scope="module")
def long_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "report.html"
    torch.manual_seed(0)
    model, x = long_model(LAYERS).eval(), torch.randn(4, 8)
    quantizer = Quantizer("onednn")
    quantizer.calib(model)(x)
    quantizer.report(path, model, [x])
    return path


class Opened:
    """A page, with what it asked for and complained of."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.told: list[str] = []
        self.page.on("request", lambda each: self.asked.append(each.url))
        self.page.on("console", lambda each: self.told.append(each.text))
        self.page.on("pageerror", lambda each: self.told.append(str(each)))
        self.page.on("dialog", lambda each: self.told.append(each.message))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]")

    def rows(self) -> list[str]:
        texts = "all => all.map(name => [...name.children].map(each => each.textContent).join(' '))"
        found: list[str] = self.page.locator(".body .row .name").evaluate_all(texts)
        return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_everything_fits(browser: Any, report: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, report, width, color_scheme=scheme)
    page = opened.page
    for name in ("body.0", EVIL, "matmul"):
        page.locator("input[type=search]").fill(name)
        page.keyboard.press("Enter")
    page.locator("input[type=search]").fill("")
    assert page.locator(".details").count() >= 3
    page.wait_for_function("document.querySelectorAll('.details svg').length > 3")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for section in ("coverage", "error", "sensitivity", "layers", "settings"):
        assert page.locator(f"section#{section}").is_visible()
    assert page.locator("h1").inner_text() == "Net, quantized"
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)"
    assert light == (scheme == "light")
    assert opened.told == []
    assert opened.asked == [report.as_uri(), "data:,"] or opened.asked == [report.as_uri()]
    opened.context.close()


def test_the_theme_can_be_chosen(browser: Any, report: Path) -> None:
    opened = Opened(browser, report, color_scheme="light")
    colour = "getComputedStyle(document.body).backgroundColor"
    before = opened.page.evaluate(colour)
    opened.page.get_by_role("button", name="dark").click()
    assert opened.page.evaluate(colour) != before
    opened.page.get_by_role("button", name="auto").click()
    assert opened.page.evaluate(colour) == before
    opened.context.close()


def test_the_keyboard_suffices(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.type") == "search"
    page.keyboard.type("body override")
    assert opened.rows() == ["▾ body", "▸ 2"]
    assert page.locator(".tools [role=status]").inner_text() == "1 of 6 layers"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert "left in float by an override" in page.locator(".details").inner_text()
    page.keyboard.press("ArrowLeft")
    assert page.locator(".details").count() == 0
    page.keyboard.press("ArrowLeft")  # to the module
    page.keyboard.press("Enter")
    assert opened.rows() == ["▸ body"]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Escape")
    assert len(opened.rows()) == 7
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    focused = "document.activeElement.querySelector('.name').title"
    last = page.evaluate(focused)
    page.keyboard.press("Home")
    assert page.evaluate(focused) == "body" != last
    assert page.locator(".body .row[tabindex='0']").count() == 1
    opened.context.close()


def test_layers_are_sorted_and_opened_from_the_figures(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    page = opened.page
    page.get_by_role("button", name="layer", exact=True).click()
    names = [each[2:] for each in opened.rows()]
    assert names == sorted(names)
    assert len(names) == 6
    page.get_by_role("button", name="layer ▴").click()
    assert [each[2:] for each in opened.rows()] == names[::-1]
    page.locator("section#sensitivity .bars button").first.click()
    assert page.locator(".details").count() == 1
    page.locator("section#error svg").focus()
    page.keyboard.press("End")
    assert page.locator("section#error .readout").inner_text().startswith("head")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.querySelector('.name').title") == "head"
    opened.context.close()


def test_pictures_of_many_layers_are_drawn_when_they_are_seen(
    browser: Any, long_report: Path
) -> None:
    opened = Opened(browser, long_report)
    page = opened.page
    page.get_by_role("button", name="Open all").click()
    assert page.locator(".body .row").count() == LAYERS * 3 // 2
    page.wait_for_timeout(100)
    drawn = page.locator(".body .row svg").count()
    assert drawn < 100
    page.keyboard.press("/")
    page.keyboard.type("249.down")
    assert opened.rows() == ["▾ 249", "▸ down"]
    page.wait_for_function("document.querySelectorAll('.body .row svg').length === 1")
    assert opened.told == []
    opened.context.close()
