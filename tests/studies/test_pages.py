"""The pages of a study in a real browser: nothing is loaded, nothing breaks, and they can be read on a phone."""

from __future__ import annotations

import shutil

import pytest
from made_up_study import ACCURACY, PERPLEXITY, made_up, model

from pruneforge.studies.report import write_report

PAGES = ("report.html", "measured.html")
METHODS = {"wanda": {"metric": "wanda"}, "fewer": {"metric": "wanda", "samples": 4}}


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install '.[dev]')")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium is installed (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Open pages; afterwards, none has complained or asked for another file."""
    said, asked, contexts = [], [], []

    def open_page(file, **settings):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url) if not request.url.startswith("data:") else None)
        contexts.append((context, file.as_uri()))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context, _ in contexts:
        context.close()
    assert said == []
    assert asked == [address for _, address in contexts]


def column(table, number):
    return table.locator(f"tbody tr td:nth-child({number})").all_inner_texts()


def test_tables_are_sorted_by_a_click_numbers_as_numbers(tmp_path, opened):
    def change(cell, found):
        if cell.method == "fewer" and cell.pattern == 0.6:
            found.clear()
            found |= {"asked": cell.asked(), "failed": "no"}
        elif cell.model == "text":
            found["evaluations"][0]["perplexity"] = {"wanda": 98.5, "random": 1234.5}.get(cell.method, 9.75)

    study, cells = made_up(tmp_path / "out", change, methods=METHODS, patterns=[0.5, 0.6], seeds=[0])
    write_report(study, cells, tmp_path / "out")
    page = opened(tmp_path / "out" / "report.html")
    table = page.locator("#model-1 table").first
    assert column(table, 3) == ["98.50", "failed", "9.75", "1,234"]
    head = table.locator("thead button").nth(2)
    head.click()
    assert column(table, 3) == ["9.75", "98.50", "1,234", "failed"]
    assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    head.click()
    assert column(table, 3) == ["1,234", "98.50", "9.75", "failed"]
    table.locator("thead button").first.click()
    assert [text.split()[0] for text in column(table, 1)] == ["fewer", "magnitude", "random", "wanda"]
    page.locator("summary", has_text="Differences").first.click()
    opened(tmp_path / "out" / "measured.html").locator("thead button").nth(3).click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_both_pages_without_scrolling_aside(scheme, tmp_path, opened):
    name = "a_model_with_a_name_that_goes_on_and_on_like_those_of_many_checkpoints"
    models = {name: model(PERPLEXITY, ACCURACY), "image": model(ACCURACY)}
    patterns = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, "2:4", "4:8"]
    study, cells = made_up(
        tmp_path / "out", models=models, methods=METHODS | {name: {"metric": "gblm"}}, patterns=patterns
    )
    write_report(study, cells, tmp_path / "out")
    for file in PAGES:
        page = opened(tmp_path / "out" / file, viewport={"width": 375, "height": 800}, color_scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, file
        assert page.locator("svg").count() > 3


HOSTILE = "</pre></code><script>alert(1)</script><img src=x onerror=alert(1)>'\"&--><svg onload=alert(1)>"


def test_no_text_of_a_study_is_markup(tmp_path, opened):
    def change(cell, found):
        if cell.method == "fewer":
            found.clear()
            found |= {"asked": cell.asked(), "failed": HOSTILE}
            return
        found["scope"] = HOSTILE
        found["versions"] = {HOSTILE: HOSTILE}
        found["masks"]["layers"] = {f"{HOSTILE}.{number}.{HOSTILE}": number / 4 for number in range(3)}
        found["details"] = {f"{HOSTILE}.0.{HOSTILE}": next(iter(found["details"].values()))}
        found["picture"]["layer"] = HOSTILE
        for evaluation in found["evaluations"]:
            evaluation |= {"task": HOSTILE, "measure": HOSTILE, HOSTILE: evaluation["loss"], "data": {"split": HOSTILE}}

    methods = METHODS | {"_under": {"metric": "gblm"}}
    study, cells = made_up(tmp_path / "out", change, methods=methods, patterns=[0.5, "2:4", 0.75], seeds=[0])
    (tmp_path / "out" / "study.yaml").write_text(f"# {HOSTILE}")
    write_report(study, cells, tmp_path / "out")
    for file in PAGES:
        page = opened(tmp_path / "out" / file)
        assert page.locator("script").count() == 1
        assert page.locator("[onerror], [onload]").count() == 0
        assert page.get_by_text(HOSTILE).count() > 0
        assert page.locator("svg text", has_text="_under").count() + page.locator(".legend", has_text="_under").count()


@pytest.mark.slow
def test_a_thousand_cells_are_a_small_page(tmp_path, opened):
    names = [f"model.layers.{block}.{role}" for block in range(32) for role in "q k v o gate up down".split()]

    def change(cell, found):
        found["masks"]["layers"] = {name: 0.5 + number % 9 / 100 for number, name in enumerate(names)}
        if "details" in found:
            layer = next(iter(found["details"].values()))
            found["details"] = {name: layer | {"scores": layer["scores"] | {"counts": [7] * 40}} for name in names}

    models = {f"model {number}": model(PERPLEXITY, ACCURACY) for number in range(5)}
    methods = {f"method {number}": {"metric": "wanda", "samples": number + 1} for number in range(8)}
    study, cells = made_up(
        tmp_path / "out", change, models=models, methods=methods, patterns=[0.5, 0.6, 0.7, "2:4"], seeds=[*range(5)]
    )
    assert len(cells) == 1000
    write_report(study, cells, tmp_path / "out")
    assert (tmp_path / "out" / "report.html").stat().st_size < 10e6
    page = opened(tmp_path / "out" / "report.html")
    page.set_default_timeout(2000)  # milliseconds, of each click
    table = page.locator("#structure table")
    table.locator("thead button", has_text="method").click()
    table.locator("thead button", has_text="pattern").click()
    assert column(table, 3)[:2] == ["2:4", "2:4"]
