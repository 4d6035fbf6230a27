"""The pictures of the documentation, taken from the page of a real run.

python docs/pictures.py runs/demo docs/pictures
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

_WIDTH = 1040


def take(run: Path, out: Path) -> None:
    """Write `headline.png`, `training.png` and `map.png` from `RUN/report.html`."""
    out.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": _WIDTH, "height": 900}, device_scale_factor=1.5)
        page.goto((run / "report.html").resolve().as_uri())
        for name, selector in (("headline", "header"), ("training", "#training")):
            _save(page.locator(selector).screenshot(), out / f"{name}.png")
        page.locator(".map circle").nth(123).hover(force=True)
        _save(page.locator(".map").screenshot(), out / "map.png")
        browser.close()


def _save(screenshot: bytes, path: Path) -> None:
    """Save a screenshot as a palette image: a third of the size, with no visible difference."""
    Image.open(io.BytesIO(screenshot)).convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
