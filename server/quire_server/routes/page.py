"""The page at `/` and the API's description at `/docs`: files of this package, and nothing from anywhere else."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

from quire_server.errors import ApiError

router = APIRouter(include_in_schema=False)

FOLDER = files("quire_server") / "page"
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
ASSETS = frozenset({"page.css", "page.js", "stream.js", "engine.js", "grid.js", "steps.js", "docs.js"})
SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def page() -> Response:
    """Chat, and what the engine does."""
    return _file("index.html")


@router.get("/docs")
async def docs() -> Response:
    """The API, from /openapi.json."""
    return _file("docs.html")


@router.get("/page/{name}")
async def asset(name: str) -> Response:
    """Style and scripts of the two."""
    if name not in ASSETS:
        raise ApiError(404, f"Invalid URL (GET /page/{name[:40]})", code="unknown_url")
    return _file(name)


def _file(name: str) -> Response:
    media_type = TYPES[name.rpartition(".")[2]]
    return Response((FOLDER / name).read_bytes(), media_type=media_type, headers=SECURITY)
