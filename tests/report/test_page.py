"""The page, opened as a person opens it: from disk, in a browser."""

import shutil
import threading
import time

import pytest

from barlow.assembly import validation_images

SECTIONS = [
    "worth",
    "data",
    "training",
    "health",
    "matrix",
    "neighbours",
    "map",
    "settings",
]


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    flags = "no-sandbox disable-gpu no-first-run disable-background-networking "
    flags += "disable-component-update disable-sync"
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=[f"--{flag}" for flag in flags.split()]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """`open_page(url, width=...)`: the page, and what the console said of it in `page.errors`."""
    contexts = []

    def open_page(url, **options):
        context = browser.new_context(viewport={"width": 1100, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.errors = []
        page.on("console", lambda message: page.errors.append(message.text))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("request", lambda r: r.url.startswith("http") and page.errors.append(r.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()


def test_every_section_is_there_and_nothing_is_wrong_or_fetched(run, open_page):
    page = open_page(run.report_file.as_uri())
    assert page.eval_on_selector_all("section", "all => all.map(s => s.id)") == SECTIONS
    assert page.errors == []
    assert page.locator(".verdict b").inner_text().endswith("%")
    assert page.locator("img:not([alt])").count() == 0
    assert page.locator("svg:not([aria-label])").count() == 0
    broken = "all => all.filter(i => !i.hidden && !i.naturalWidth).length"
    assert page.eval_on_selector_all("img", broken) == 0


def test_curves_and_map_have_as_many_points_as_the_data(run, open_page):
    page = open_page(run.report_file.as_uri())
    loss = page.locator("figure.chart", has=page.locator("figcaption", has_text="Loss")).first
    drawn = [
        len(p.split())
        for p in loss.locator("polyline").evaluate_all(
            "all => all.map(line => line.getAttribute('points'))"
        )
    ]
    rows = run.metrics()
    assert drawn == [len(rows), sum("val_loss" in row for row in rows)]
    assert page.locator(".map circle").count() == 60


def test_pointing_at_the_map_shows_the_image_and_at_a_curve_its_values(run, open_page):
    page = open_page(run.report_file.as_uri())
    tip = page.locator(".map .tip")
    assert tip.is_hidden()
    page.locator(".map circle").nth(7).hover(force=True)
    assert tip.is_visible()
    on = page.locator(".map circle.on")
    index = on.evaluate("point => [...point.parentNode.children].indexOf(point)")
    text = tip.inner_text()
    assert text.endswith(validation_images(run.settings()).ids[index])
    assert "url(" in tip.locator("i").evaluate("i => i.style.backgroundImage")
    page.locator(".map svg").focus()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() != text
    chart = page.locator("figure.chart").first
    chart.locator("svg").hover()
    assert "training" in chart.locator("output").inner_text()


def test_a_class_can_be_picked_out_of_the_map(run, open_page):
    page = open_page(run.report_file.as_uri())
    page.locator(".keys button", has_text="3").click()
    labels = validation_images(run.settings()).labels
    assert page.locator(".map circle.kept").count() == int((labels == 3).sum()) > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scroll(run, open_page, scheme):
    page = open_page(run.report_file.as_uri(), color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.errors == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
    assert dark == (scheme == "dark")


def test_the_page_of_several_runs_draws_their_curves_over_each_other(run, open_page, tmp_path):
    from barlow.report import write_report

    other = tmp_path / "other"
    shutil.copytree(run.path, other)
    text = (other / "config.yaml").read_text().replace("lambd: 0.01", "lambd: 0.02")
    (other / "config.yaml").write_text(text)
    out = write_report([str(run.path), str(other)], out=str(tmp_path / "both.html"))
    page = open_page(out.as_uri())
    assert page.errors == []
    assert page.locator("figure.chart").first.locator("polyline").count() == 4
    difference = page.locator("#settings table").inner_text().split()
    assert difference == ["setting", "tiny", "other", "lambd", "0.01", "0.02"]


def test_a_run_that_goes_on_renews_its_page(run, open_page, tmp_path):
    from barlow.report.watch import server_of
    from barlow.run import Run

    shutil.copytree(run.path, tmp_path / "live")
    live = Run(tmp_path / "live")
    server = server_of(str(live.path))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        page = open_page(f"http://127.0.0.1:{server.server_port}/")
        loss = page.locator("figure.chart polyline").first
        before = len(loss.get_attribute("points").split())
        live.add_metrics([run.metrics()[-1] | {"step": 99, "epoch": 4}])
        until = time.monotonic() + 30
        while len(loss.get_attribute("points").split()) == before and time.monotonic() < until:
            page.wait_for_timeout(200)
        assert len(loss.get_attribute("points").split()) == before + 1
        page.wait_for_selector(".map circle", timeout=60_000)
        assert [e for e in page.errors if not e.startswith("http://127.0.0.1")] == []
    finally:
        page.context.close()
        server.shutdown()
        thread.join()
        server.server_close()
