"""The pages in a browser: axe-core's rules, no sideways scrolling on a phone, dark and light.

``python -m playwright install chromium`` fetches a browser where the system has none.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.__main__ import main
from pipeline.report.nights import history_page
from tests.test_report import CONTENT, FIRST, JPEG, REPORT, render
from tests.test_report_command import finished, nights  # noqa: F401 - a fixture

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
GRAVE = ("serious", "critical")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright import sync_api as playwright

    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as started:
        path = Path(found or started.chromium.executable_path)
        if not path.exists():
            pytest.skip("needs Chromium")
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, finished: Any) -> dict[str, Path]:  # noqa: F811
    from datetime import date

    folder = tmp_path_factory.mktemp("pages")
    clean, failed, compared, night = (folder / f"{name}.html" for name in ("clean", "failed", "compare", "nights"))
    clean.write_bytes((Path(finished.output.dir) / "_report.html").read_bytes())
    failed.write_text(render(REPORT, CONTENT, [FIRST], dict.fromkeys((0, 1, 2), JPEG), plots=True))
    assert main(["--compare", finished.output.dir, finished.output.dir, "--out", str(compared)]) == 0
    nights(folder / "runs.parquet", [date(2026, 11, 1), date(2026, 11, 3)], exit_code=[0, 3], new=[5, 3])
    night.write_bytes(history_page(str(folder)))
    return {path.stem: path for path in (clean, failed, compared, night)}


@pytest.mark.compat("playwright")
@pytest.mark.parametrize("width", [1100, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["clean", "failed", "compare", "nights"])
def test_a_page_has_no_serious_fault(browser: Any, pages: dict[str, Path], name: str, scheme: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        page = context.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(pages[name].as_uri())
        found = Axe().run(page).response["violations"]
        assert [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in GRAVE] == []
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        shown = page.evaluate("[...document.querySelectorAll('.plot')].filter(one => one.offsetHeight > 0).length")
        assert shown == page.evaluate("document.querySelectorAll('.plot').length")
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    finally:
        context.close()
