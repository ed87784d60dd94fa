"""The page of a recorded run in a browser: its figures are there, nothing is fetched, nothing is wider than a phone."""

from __future__ import annotations

import shutil

import pytest

from hf_gradclip.analysis.report import write_report
from tests.analysis.records import norms_of, recorded

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page(width, tmp_path) -> None:
    from playwright.sync_api import sync_playwright

    recorded("zclip:warmup_steps=10", tmp_path, norms_of(300), loss=3.0)
    page_file, *pictures = write_report([tmp_path])
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert browser_path, "no Chromium on this machine: install it, or leave out -m browser"
    errors: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        images = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
        whole = page.evaluate("document.documentElement.scrollWidth")
        said = page.inner_text("ul.findings")
        browser.close()
    assert errors == []
    assert [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
    assert len(images) == len(pictures) >= 4
    assert all(complete and natural > 0 and shown > 0.85 * min(width, 900) for complete, natural, shown in images)
    assert images[0][1] == (690 if width == 390 else 1350), "a phone gets the narrow drawing"
    assert whole <= width
    assert "clipped in" in said
