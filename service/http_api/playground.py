"""The playground: one page for people with a browser, made of three files of this package."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

PATH = "/playground"
TYPES = {
    "index.html": "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
}
HEADERS = {
    # Scripts and styles are files of this server alone; the page talks to this server alone.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def playground_routes() -> list[BaseRoute]:
    """The page at ``PATH`` and its files below it. They need no key: what they call does."""
    return [
        Route(PATH if name == "index.html" else f"{PATH}/{name}", _serving(name), methods=["GET"])
        for name in TYPES
    ]


def _serving(name: str) -> Callable[[Request], Awaitable[Response]]:
    content = (files(__package__) / "playground_page" / name).read_bytes()

    async def serve(request: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=TYPES[name])

    return serve
