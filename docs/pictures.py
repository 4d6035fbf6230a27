"""The pictures of the README, taken from the page of a real run.

python docs/pictures.py runs/demo docs/pictures
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

_WIDTH = 1000


def take(run: Path, out: Path) -> None:
    """Write `headline.png`, `matrix.png` and `map.png` from `RUN/report.html`."""
    out.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": _WIDTH, "height": 900}, device_scale_factor=1.5)
        page.goto((run / "report.html").resolve().as_uri())
        page.screenshot(
            path=out / "headline.png",
            full_page=True,
            clip={"x": 0, "y": 0, "width": _WIDTH, "height": _below(page, "header") + 10},
        )
        page.locator("#matrix .grid").first.screenshot(path=out / "matrix.png")
        page.locator(".map circle").nth(123).hover(force=True)
        page.locator(".map").screenshot(path=out / "map.png")
        browser.close()


def _below(page: object, selector: str) -> float:
    box = page.locator(selector).bounding_box()  # type: ignore[attr-defined]
    return float(box["y"] + box["height"])


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
