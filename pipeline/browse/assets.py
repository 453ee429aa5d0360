"""The templates, scripts and style of the page."""

from __future__ import annotations

import shlex
from functools import cache
from pathlib import Path
from urllib.parse import urlencode

from jinja2 import ChoiceLoader, Environment, PackageLoader
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

MEDIA = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def environment() -> Environment:
    """The templates, in which every text is escaped."""
    loader = ChoiceLoader([PackageLoader("pipeline.browse", "templates"), PackageLoader("pipeline.report", ".")])
    made = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.filters["shell"] = shlex.quote
    made.filters["count"] = "{:,}".format
    made.filters["query"] = lambda pairs: urlencode(list(pairs.items()) if isinstance(pairs, dict) else pairs)
    made.tests["nan"] = lambda value: value != value
    return made


@cache
def _files() -> dict[str, bytes]:
    folder = Path(__file__).parent / "static"
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in MEDIA}
    style = environment().get_template("style.css.j2").render().encode()
    found["style.css"] = style + found.pop("browse.css")
    return found


def static(request: Request) -> Response:
    """A script or the style."""
    name = request.path_params["name"]
    data = _files().get(name)
    if data is None:
        raise HTTPException(404, "there is no such file")
    return Response(data, media_type=MEDIA[Path(name).suffix], headers={"cache-control": "private, no-cache"})
