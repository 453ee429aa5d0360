"""The page: routes, and what each of them answers."""

from __future__ import annotations

import hashlib
import tempfile
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.convertors import IntegerConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from pipeline.browse import views
from pipeline.browse.assets import environment, static
from pipeline.browse.collection import FRESH_SECONDS, Collection
from pipeline.browse.conditions import OPERATORS, WITHOUT_VALUE, conditional
from pipeline.browse.exports import ENDINGS, command_of, export
from pipeline.browse.measures import count_labels
from pipeline.browse.opened import OpenedDataset
from pipeline.browse.pictures import NO_PICTURE
from pipeline.browse.points import points_of
from pipeline.browse.selection import Selection, orders_of
from pipeline.browse.works import Works
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.core.records import Failure
from pipeline.report.summary import HINTS

# Seconds that a request waits for its work, before it shows the progress instead.
PATIENCE = 0.6
# Pictures of an export, which is written to a temporary folder first.
MOST_PICTURES = 10_000
# Bytes of an uploaded picture.
MOST_UPLOADED = 64 * 2**20


class Number(IntegerConvertor):
    """A number in a path, of as many digits as a row can have."""

    regex = "[0-9]{1,18}"


register_url_convertor("number", Number())


class Page:
    """The routes of the page over a collection."""

    def __init__(self, collection: Collection) -> None:
        self._collection, self._works = collection, Works()
        self._templates = environment()

    def app(self) -> Starlette:
        """The app of all routes."""
        of_dataset = {
            "/": self.rows, "/row/{row:number}": self.row, "/thumbnail/{row:number}": self.thumbnail,
            "/picture/{row:number}": self.picture, "/labels": self.labels, "/failures": self.failures,
            "/duplicates": self.groups, "/clusters": self.groups, "/map": self.map, "/map.json": self.points,
            "/about": self.about, "/export": self.export,
        }  # fmt: skip
        return Starlette(
            routes=[
                Route("/", self.index),
                Route("/static/{name}", static),
                Route("/nights/{store:number}", self.nights),
                *(Route(f"/{{number:number}}{path}", handler) for path, handler in of_dataset.items()),
                Route("/{number:number}/upload", self.upload, methods=["POST"]),
            ],
            exception_handlers={PipelineError: self.failed, HTTPException: self.refused, Exception: self.broken},
        )

    def stop(self) -> None:
        """Begin no more work, and end what runs at its next step."""
        self._works.close()

    def close(self) -> None:
        """Stop, and end the processes of the datasets."""
        self.stop()
        self._collection.close()

    def index(self, request: Request) -> Response:
        """The datasets and stores."""
        if len(self._collection.entries) == 1:
            return RedirectResponse("/0/", 303)
        return self._show("index.html.j2", entries=self._collection.entries, stores=self._collection.stores)

    def rows(self, request: Request) -> Response:
        """Rows of a selection, as a grid."""
        number, opened = self._opened(request)
        selection = Selection.parse(request.query_params.multi_items(), opened.dataset)
        start = _whole(request, "from")
        key = self._key(opened, selection.address(), opened.made(selection.group))
        work = self._works.start(key, partial(opened.find, selection))
        result, problem = None, ""
        try:
            result = work.result(PATIENCE)
        except ConfigError as error:
            problem = views.message_of(error)
        part = request.query_params.get("part", "")
        tiles = [] if result is None else views.listed(opened, selection, result, start)
        if part == "near":
            # The first is the row itself.
            tiles = [each for each in tiles if each.row != selection.like][: views.NEAR]
        context: dict[str, Any] = {
            "selection": selection, "result": result, "work": work, "start": start, "problem": problem,
            "again": f"/{number}/?{selection.address(part=part or 'results')}",
            "tiles": tiles,
            "next": start + views.TILES if result is not None and start + views.TILES < len(result.rows) else None,
        }  # fmt: skip
        if start or part:
            name = "near" if part == "near" else "results"
            return self._show(f"{name}.html.j2", number=number, opened=opened, **context)
        self._works.start(self._key(opened, "warm up"), opened.warm_up)
        return self._page(
            "rows.html.j2", number, opened, "rows", **context,
            orders=orders_of(opened.dataset), columns=conditional(opened.dataset), operators=OPERATORS,
            without_value=WITHOUT_VALUE, formats=ENDINGS, command=command_of(opened, selection),
        )  # fmt: skip

    def row(self, request: Request) -> Response:
        """One row."""
        number, opened = self._opened(request)
        row = self._row(request, opened)
        return self._page(
            "row.html.j2", number, opened, "rows", row=row, tile=views.tiles(opened, [row])[0],
            cells=views.row_of(opened, row), best=views.best_labels(opened, row), rows=opened.dataset.plan.rows,
            provenance=views.provenance(opened),
        )  # fmt: skip

    def thumbnail(self, request: Request) -> Response:
        """The thumbnail of a row."""
        _, opened = self._opened(request)
        row = self._row(request, opened)
        # Another dataset may be at this address tomorrow, so a browser asks each time.
        tag = f'"{hashlib.sha256(opened.pictures.state.encode()).hexdigest()[:24]}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"etag": tag})
        data = opened.pictures.thumbnail(row)
        headers = {"cache-control": "private, no-cache", "etag": tag} if data else {"cache-control": "no-store"}
        return Response(data or NO_PICTURE, media_type="image/jpeg" if data else "image/svg+xml", headers=headers)

    def picture(self, request: Request) -> Response:
        """The picture of a row as it is stored, if browsers show its format."""
        _, opened = self._opened(request)
        found = opened.pictures.original(self._row(request, opened))
        if isinstance(found, Failure):
            raise HTTPException(404, f"{found.status}: {found.error}")
        if not found.kind:
            raise HTTPException(415, "browsers do not show this format; the thumbnail shows the picture")
        # Nothing in it can run.
        headers = {"content-security-policy": "default-src 'none'; sandbox"}
        return Response(found.data, media_type=found.kind, headers=headers)

    async def upload(self, request: Request) -> Response:
        """Embed an uploaded picture, and search with it."""
        from starlette.concurrency import run_in_threadpool

        length = request.headers.get("content-length", "")
        if not length.isdecimal() or "transfer-encoding" in request.headers:
            raise HTTPException(411, "the length of the picture is not given")
        if len(length) > 12 or int(length) > MOST_UPLOADED:
            raise HTTPException(413, f"the picture is larger than {MOST_UPLOADED >> 20} MiB")
        number, opened = await run_in_threadpool(self._opened, request)
        async with request.form(max_files=1) as form:
            picture = form.get("picture")
            if picture is None or isinstance(picture, str):
                raise HTTPException(400, "no picture was chosen")
            data = await picture.read()
            rest = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
        try:
            key = await run_in_threadpool(opened.upload, data)
        except ConfigError as error:
            # Of the copy that was embedded, whose place nobody knows.
            raise HTTPException(400, f"picture: {error.problems[0].allowed}") from error
        return RedirectResponse(f"/{number}/?{urlencode([*rest, ('image', key)])}", 303)

    def labels(self, request: Request) -> Response:
        """Labels with counts and histograms, and their confusion with a column."""
        number, opened = self._opened(request)
        dataset = opened.dataset
        if "label" not in dataset.schema.names:
            return self._page("labels.html.j2", number, opened, "labels", counts=None)
        truth = request.query_params.get("truth", "")
        known = conditional(dataset)
        columns = [name for name in dataset.kept if name in known]
        if truth not in ("", *columns):
            raise HTTPException(400, f"there is no column {truth}")
        counts, table, work = self._counts(opened, truth)
        find = request.query_params.get("find", "").strip()
        names = [name for name in (counts.counts if counts else ()) if find.lower() in name.lower()]
        return self._page(
            "labels.html.j2", number, opened, "labels", counts=counts, table=table, work=work, truth=truth, find=find,
            found=len(names), names=names[: views.LABELS],
            columns=columns,
            again=f"/{number}/labels?{urlencode({'truth': truth, 'find': find})}",
        )  # fmt: skip

    def failures(self, request: Request) -> Response:
        """Failed rows by status."""
        number, opened = self._opened(request)
        counts = views.failures(opened)
        shown: dict[str, Any] = {}
        work = None
        for status in list(counts)[:12]:
            selection = Selection.parse([("column", "status"), ("op", "is"), ("value", status)], opened.dataset)
            work = self._works.start(self._key(opened, selection.address()), partial(opened.find, selection))
            result = work.result(PATIENCE)
            if result is None:
                break
            shown[status] = (selection, views.tiles(opened, result.rows[: views.OF_GROUP].tolist()))
        ready = len(shown) == min(12, len(counts))
        return self._page(
            "failures.html.j2", number, opened, "failures", failed=counts, shown=shown, hints=HINTS, work=work,
            ready=ready, again=f"/{number}/failures", rows=opened.dataset.plan.rows,
        )  # fmt: skip

    def groups(self, request: Request) -> Response:
        """Near duplicates or clusters, if there are any."""
        number, opened = self._opened(request)
        kind, there = request.url.path.rpartition("/")[2], opened.analyses()
        sample = there.get("sample") if kind == "clusters" else None
        if kind not in there:
            return self._page("groups.html.j2", number, opened, kind, kind=kind, found=None, work=None, sample=sample)
        page = _whole(request, "page")
        key = self._key(opened, kind, str(page), opened.made(kind))
        work = self._works.start(key, lambda progress: views.groups_of(opened, kind, page))
        return self._page(
            "groups.html.j2", number, opened, kind, kind=kind, found=work.result(PATIENCE), work=work,
            again=f"/{number}/{kind}?page={page}", sample=sample,
        )  # fmt: skip

    def map(self, request: Request) -> Response:
        """The map of a dataset, which a script draws."""
        number, opened = self._opened(request)
        return self._page("map.html.j2", number, opened, "map")

    def points(self, request: Request) -> Response:
        """The points of the map, or the progress of their making."""
        _, opened = self._opened(request)
        work = self._works.start(self._key(opened, "map"), lambda progress: points_of(opened.dataset, progress))
        found = work.result(PATIENCE)
        return JSONResponse({"done": work.done, "total": work.total} if found is None else found)

    def about(self, request: Request) -> Response:
        """The provenance of a dataset."""
        number, opened = self._opened(request)
        return self._page("about.html.j2", number, opened, "about", facts=views.provenance(opened))

    def export(self, request: Request) -> Response:
        """The rows of a selection as a file."""
        _, opened = self._opened(request)
        selection = Selection.parse(request.query_params.multi_items(), opened.dataset)
        form = request.query_params.get("format", "parquet")
        folder = tempfile.TemporaryDirectory(prefix="clip-pipeline-")
        try:
            path = Path(folder.name) / f"rows{ENDINGS.get(form, '')}"
            export(opened, selection, form, path, most=MOST_PICTURES, progress=self._works.step)
        except BaseException:
            folder.cleanup()
            raise
        name = f"rows{ENDINGS[form]}"
        return FileResponse(path, filename=name, media_type="application/octet-stream",
                            background=BackgroundTask(folder.cleanup))  # fmt: skip

    def nights(self, request: Request) -> Response:
        """The nights of a store."""
        store = request.path_params["store"]
        if store >= len(self._collection.stores):
            raise HTTPException(404, "there is no such store")
        key = ("nights", store, len(self._collection.entries))
        work = self._works.start(
            key, lambda progress: views.nights_of(self._collection, store, progress), fresh=FRESH_SECONDS
        )
        return self._show(
            "nights.html.j2", store=self._collection.stores[store], nights=work.result(PATIENCE), work=work,
            again=f"/nights/{store}", several=True,
        )  # fmt: skip

    def failed(self, request: Request, error: Exception) -> Response:
        """A page that says what is wrong with a dataset or a request."""
        code = HTTPStatus.BAD_REQUEST if isinstance(error, ConfigError) else HTTPStatus.SERVICE_UNAVAILABLE
        return self._message(request, code, views.message_of(error))

    def refused(self, request: Request, error: Exception) -> Response:
        """A page for a request without an answer."""
        assert isinstance(error, HTTPException)
        text = "there is no such page" if error.detail == "Not Found" else error.detail
        return self._message(request, error.status_code, text)

    def broken(self, request: Request, error: Exception) -> Response:
        """A page for an error that nobody expected; its traceback is in the log."""
        text = f"unexpected error: {type(error).__name__}: {error}"
        return self._message(request, HTTPStatus.INTERNAL_SERVER_ERROR, text)

    def _message(self, request: Request, code: int, text: str) -> Response:
        # An answer to htmx becomes a piece of the page that asks.
        template = "error.html.j2" if "hx-request" in request.headers else "message.html.j2"
        return self._show(template, code, heading="This cannot be shown", text=text)

    def _counts(self, opened: OpenedDataset, truth: str) -> tuple[Any, Any, Any]:
        work = self._works.start(self._key(opened, "labels"), lambda progress: count_labels(opened.dataset, progress))
        counts = work.result(PATIENCE)
        if counts is None or not truth:
            return counts, None, work
        work = self._works.start(
            self._key(opened, "truth", truth), lambda progress: views.confused(opened, truth, progress)
        )
        return counts, work.result(PATIENCE), work

    def _opened(self, request: Request) -> tuple[int, OpenedDataset]:
        number = request.path_params["number"]
        if number >= len(self._collection.entries):
            raise HTTPException(404, "there is no such dataset")
        return number, self._collection.open(number)

    def _row(self, request: Request, opened: OpenedDataset) -> int:
        row: int = request.path_params["row"]
        if row >= opened.dataset.plan.rows:
            raise HTTPException(404, "there is no such row")
        return row

    def _key(self, opened: OpenedDataset, *words: str) -> tuple[str, ...]:
        return (opened.dataset.url, opened.dataset.fingerprint["success"], *words)

    def _page(self, template: str, number: int, opened: OpenedDataset, active: str, **context: Any) -> Response:
        entry = self._collection.entries[number]
        several = len(self._collection.entries) > 1
        return self._show(
            template, number=number, opened=opened, entry=entry, active=active, several=several, **context
        )

    def _show(self, template: str, code: int = 200, **context: Any) -> Response:
        page = self._templates.get_template(template).render(**context)
        return HTMLResponse(page, status_code=code, headers={"cache-control": "no-store"})


def _whole(request: Request, name: str) -> int:
    given = request.query_params.get(name, "0")
    if not given.isdecimal() or len(given) > 12:
        raise HTTPException(400, f"{name} must be a whole number")
    return int(given)
