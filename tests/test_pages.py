"""The pages in a browser: axe-core's rules, no sideways scrolling on a phone, dark and light; walks over datasets.

``python -m playwright install chromium`` fetches a browser where the system has none.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("python_multipart", reason="needs the extra serve")

from pipeline.dedup import main as dedup
from pipeline.report.__main__ import main
from pipeline.report.nights import history_page
from tests.finished import run_scenes
from tests.jobs import scenes_manifest
from tests.nights import Collection as Photos
from tests.nights import night as photo_night
from tests.sites import Site, sites
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


# --- the page over datasets ---


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dataset of scenes with five copies of one, which were found, and a store of two nights with failures."""
    folder = tmp_path_factory.mktemp("datasets")
    manifest = scenes_manifest(folder / "m.parquet", 120)
    table = pq.read_table(manifest)
    copies = table.slice(40, 1).to_pylist() * 4
    copies = [{**row, "id": f"copy-{number}"} for number, row in enumerate(copies)]
    pq.write_table(pa.concat_tables([table, pa.Table.from_pylist(copies, table.schema)]), manifest)
    run_scenes(folder, "scenes", manifest)
    assert dedup([str(folder / "scenes"), "--threshold", "0.999"]) == 0
    (folder / "photos").mkdir()
    photos = Photos(folder / "photos")
    for day in ("2026-11-27", "2026-11-28"):
        for number in range(12):
            photos.draw(number, damaged=number == 3)
        if day.endswith("28"):
            photos.draw(5, version=1, missing=True)
        photos.write()
        photo_night(photos.config(), folder / "nights", day)
    return {"scenes": folder / "scenes", "nights": folder / "nights"}


@pytest.fixture(scope="module")
def served(datasets: dict[str, Path]) -> Iterator[Site]:
    with sites() as serve:
        yield serve(datasets["scenes"], datasets["nights"])


@pytest.fixture
def walk(browser: Any, served: Site, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A browser on the address that the command prints; at its end, it has asked nobody else and met no error."""
    width, scheme = getattr(request, "param", (1440, "light"))
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, asked, errors = context.new_page(), list[str](), list[str]()
    page.on("request", lambda one: asked.append(one.url))
    page.on("console", lambda said: errors.append(said.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    base = f"http://127.0.0.1:{served.port}"
    page.goto(f"{base}/?token={served.token}")
    page.set_default_timeout(20_000)
    yield page
    assert [url for url in asked if not url.startswith(base)] == []
    assert errors == []
    context.close()


def shown(page: Any) -> list[int]:
    """The rows of the tiles on a page, once they are there."""
    page.wait_for_selector("a.picture")
    return [
        int(link.rpartition("/")[2])
        for link in page.eval_on_selector_all(".picture", "all => all.map(one => one.href)")
    ]


@pytest.mark.compat("playwright")
@pytest.mark.parametrize("words", ["most certain", "least certain"])
def test_a_stranger_finds_the_most_and_least_certain_rows_of_a_label(walk: Any, datasets: Any, words: str) -> None:
    frame = pq.read_table(datasets["scenes"], columns=["label", "score"]).to_pandas()
    label = frame["label"].value_counts().index[0]
    walk.get_by_role("link", name="scenes").click()
    walk.get_by_role("link", name="Labels").click()
    walk.get_by_role("row", name=label).get_by_role("link", name=words).click()
    mine = frame[frame["label"] == label].sort_values("score", ascending=words == "least certain", kind="stable")
    assert shown(walk)[:10] == mine.index.tolist()[:10]


@pytest.mark.compat("playwright")
def test_a_link_in_a_message_opens_the_page(browser: Any, served: Site) -> None:
    context = browser.new_context()
    try:
        page = context.new_page()
        link = f"<a href='http://127.0.0.1:{served.port}/?token={served.token}'>look</a>"
        page.route("http://chat.example/", lambda route: route.fulfill(body=link, content_type="text/html"))
        page.goto("http://chat.example/")
        page.get_by_role("link", name="look").click()
        page.wait_for_selector("text=Timeline of the nights")
    finally:
        context.close()


@pytest.mark.compat("playwright")
def test_a_stranger_finds_near_duplicates(walk: Any) -> None:
    walk.get_by_role("link", name="scenes").click()
    walk.get_by_role("link", name="Near duplicates").click()
    assert shown(walk)[:5] == [40, 120, 121, 122, 123]
    walk.get_by_role("link", name="group 0").click()
    walk.wait_for_selector("text=5 rows")
    assert sorted(shown(walk)) == [40, 120, 121, 122, 123]


@pytest.mark.compat("playwright")
def test_a_stranger_finds_the_failures_of_last_night(walk: Any) -> None:
    walk.get_by_role("link", name="Timeline of the nights").click()
    row = walk.get_by_role("row", name="2026-11-28")
    row.get_by_role("link", name="2", exact=True).click()
    walk.wait_for_selector("text=2 of 12 rows failed")
    assert sorted(shown(walk)) == [3, 5]
    assert walk.get_by_role("heading", name="not_found").is_visible()
    assert walk.get_by_role("heading", name="not_an_image").is_visible()


@pytest.mark.compat("playwright")
@pytest.mark.parametrize("walk", [(1440, "light"), (390, "dark")], indirect=True)
def test_a_stranger_finds_what_a_text_says_by_the_keyboard_alone(walk: Any, datasets: Any) -> None:
    table = pq.read_table(datasets["scenes"], columns=["truth", "label"])
    truth = table["truth"][0].as_py()
    walk.get_by_role("link", name="scenes").press("Enter")
    walk.wait_for_selector("[data-search]")
    walk.keyboard.press("/")
    walk.keyboard.type(f"a {truth}")
    walk.keyboard.press("Enter")
    walk.wait_for_selector("text=similarity")
    rows = shown(walk)
    assert table["label"][rows[0]].as_py() == truth
    walk.locator("a.picture").first.focus()
    walk.keyboard.press("ArrowRight")
    walk.keyboard.press("Enter")
    walk.wait_for_selector("text=Best labels")
    assert walk.url.endswith(f"/row/{rows[1]}")


@pytest.mark.compat("playwright")
def test_more_rows_come_as_one_scrolls_and_thumbnails_with_them(walk: Any) -> None:
    walk.get_by_role("link", name="scenes").click()
    assert len(shown(walk)) == 48
    for _ in range(200):
        walk.mouse.wheel(0, 3000)
        walk.wait_for_timeout(100)
        if len(shown(walk)) == 124:
            break
    assert shown(walk) == list(range(124))
    loaded = "[...document.images].filter(one => one.complete && one.naturalWidth > 0).length"
    for _ in range(200):
        if walk.evaluate(loaded) > 100:
            break
        walk.wait_for_timeout(100)
    assert walk.evaluate(loaded) > 100


@pytest.mark.compat("playwright")
def test_a_point_of_the_map_leads_to_its_row(walk: Any) -> None:
    walk.get_by_role("link", name="scenes").click()
    walk.get_by_role("link", name="Map").click()
    walk.wait_for_selector("text=122 rows")
    drawn = "document.getElementById('map').toDataURL().length"
    before = walk.evaluate(drawn)
    walk.locator("#map").focus()
    for key in ("+", "+", "ArrowLeft", "-"):
        walk.keyboard.press(key)
    assert walk.evaluate(drawn) != before
    for _ in range(30):
        walk.keyboard.press("Enter")
        if walk.locator("#map-point a").count():
            break
        walk.keyboard.press("-")
    walk.locator("#map-point a").click()
    walk.wait_for_selector("text=Best labels")


PAGES = [
    "/", "/0/?q=a+circle", "/0/?column=label&op=some&value=&sort=margin", "/0/labels?truth=truth", "/0/failures",
    "/0/duplicates", "/0/clusters", "/0/map", "/0/about", "/0/row/0", "/0/row/3", "/nights/0", "/1/failures",
    "/0/row/9999",
]  # fmt: skip


@pytest.mark.compat("playwright")
@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pages_over_datasets_have_no_serious_fault(browser: Any, served: Site, scheme: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        page = context.new_page()
        base = f"http://127.0.0.1:{served.port}"
        page.goto(f"{base}/?token={served.token}")
        for path in PAGES:
            page.goto(f"{base}{path}")
            page.wait_for_function("!document.querySelector('.waiting')")
            # Its script is evaluated by the browser itself, which the policy of the page does not concern.
            found = Axe().run(page).response["violations"]
            faults = [(path, each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in GRAVE]
            assert faults == []
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert (path, wide) == (path, 0)
    finally:
        context.close()


@pytest.mark.compat("playwright")
def test_an_error_of_a_long_search_is_shown_where_its_progress_was(
    browser: Any, datasets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    from pipeline.browse.opened import OpenedDataset
    from pipeline.core.errors import StorageError

    def fail(*given: Any) -> None:
        # After the first answer, and between two questions.
        time.sleep(0.8)
        raise StorageError("part-00001 is damaged")

    monkeypatch.setattr(OpenedDataset, "find", fail)
    with sites() as serve:
        made = serve(datasets["scenes"])
        context = browser.new_context()
        try:
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{made.port}/0/?sort=score&token={made.token}")
            assert page.locator(".waiting").count() == 1
            page.wait_for_selector("text=part-00001 is damaged", timeout=10_000)
            assert page.locator(".waiting").count() == 0
            assert page.locator("header").count() == 1
        finally:
            context.close()
