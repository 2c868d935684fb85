"""The description of this API: for programs, and as a page for people that loads nothing from elsewhere."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from taskd.api.answers import Answer
from taskd.api.route import Call, Route
from taskd.errors import Refused

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
_HEADERS = (
    ("Content-Security-Policy", CSP),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
)
_KINDS = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml; charset=utf-8",
}
"""The files that the page loads; there is no way to any other."""


async def openapi(call: Call) -> Answer:
    """Describe all routes: OpenAPI 3.1."""
    return Answer(200, call.services.openapi)


async def page(call: Call) -> Answer:
    """Show the description as a page."""
    return Answer(200, _file("page.html"), list(_HEADERS), kind="text/html; charset=utf-8")


async def file(call: Call) -> Answer:
    """Serve what the page of `/docs` loads."""
    name = call.part("file")
    if name not in _KINDS:
        raise Refused("not_found", "there is no such file")
    return Answer(200, _file(name), list(_HEADERS), kind=_KINDS[name])


@cache
def _file(name: str) -> bytes:
    return (files("taskd.api") / "static" / name).read_bytes()


ROUTES = (
    Route(method="GET", path="/openapi.json", run=openapi),
    Route(method="GET", path="/docs", run=page),
    Route(method="GET", path="/docs/<file:str>", run=file),
)
