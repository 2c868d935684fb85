"""The OpenAPI 3.1 document, made from the table of routes and the shapes beside it.

Which errors a route can answer follows from what the route is: a body brings those of the parser, a scope
those of keys. So a new route is described as soon as it is there, and its own shape adds the rest.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from taskd import __version__
from taskd.api.answers import STATUS
from taskd.api.route import Route
from taskd.api.shapes import SCHEMAS, SHAPES, Parameter, Shape

_PARTS = re.compile(r"<(\w+):\w+>")

_ALWAYS = ("bad_request", "request_timeout", "too_large", "internal_error", "shutting_down")
_GUARDED = ("unauthorized", "rate_limited", "overloaded", "database_unavailable")
_OF_BODY = (
    "invalid_json",
    "unsupported_value",
    "number_out_of_range",
    "duplicate_key",
    "too_deep",
    "too_many_keys",
    "invalid_body",
    "missing_field",
    "invalid_field",
    "unknown_field",
    "unsupported_media_type",
)
_LIMITED = ("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")
_INTEGER = {"type": "integer"}
_HEADERS: dict[str, Any] = {
    "X-Request-Id": {"description": "Stands in the log too.", "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds after which another try is worth it.", "schema": _INTEGER},
    "WWW-Authenticate": {"description": "What is missing.", "schema": {"type": "string"}},
    "Location": {"description": "The path of the job.", "schema": {"type": "string"}},
    "RateLimit-Limit": {"description": "The burst of the key.", "schema": _INTEGER},
    "RateLimit-Remaining": {"description": "Requests that pass at once.", "schema": _INTEGER},
    "RateLimit-Reset": {"description": "Seconds until the burst is whole again.", "schema": _INTEGER},
}
_ABOUT = (
    "A job queue as a service on PostgreSQL. Clients send `X-API-Key`, operators `Authorization: Bearer`. "
    "Every answer has `X-Request-Id`; every error has the same form."
)


def encoded(routes: Sequence[Route]) -> bytes:
    """Return the document as JSON."""
    return msgspec.json.encode(document(routes))


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """Return the document that describes `routes`."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.shown_path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "taskd",
            "version": __version__,
            "description": _ABOUT,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in dict.fromkeys(_shape(route).group for route in routes)],
        "paths": paths,
        "components": {
            "schemas": {name: dict(schema) for name, schema in SCHEMAS.items()},
            "headers": _HEADERS,
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "admin": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def codes_of(route: Route) -> tuple[str, ...]:
    """Return the error codes that a route can answer, in the order of `answers.STATUS`."""
    shape = _shape(route)
    found = {*_ALWAYS, *shape.codes}
    if route.scope is not None or route.admin:
        found.update(_GUARDED)
    if route.scope is not None:
        found.add("forbidden")
    if route.body:
        found.update(_OF_BODY)
    if shape.parameters:
        found.add("invalid_field")
    if _PARTS.search(route.path):
        found.add("not_found")
    return tuple(code for code in STATUS if code in found)


def _shape(route: Route) -> Shape:
    given = SHAPES.get(f"{route.method} {route.shown_path}")
    return given or Shape(group="More", answer=None)


def _operation(route: Route) -> dict[str, Any]:
    shape = _shape(route)
    text = " ".join((inspect.getdoc(route.run) or "").split())
    module = route.run.__module__.rpartition(".")[2]
    operation: dict[str, Any] = {
        "operationId": f"{module}_{route.run.__name__.strip('_')}",
        "tags": [shape.group],
        "summary": text.partition(". ")[0].rstrip("."),
        "description": text,
        "parameters": [*_path_parts(route), *map(_parameter, shape.parameters)],
        "responses": dict(_responses(route, shape)),
        "security": [],
    }
    if route.scope is not None:
        operation["security"] = [{"key": []}]
        operation["description"] += f" The key needs the scope `{route.scope}`."
    elif route.admin:
        operation["security"] = [{"admin": []}]
    if shape.body is not None:
        content = {kind: {"schema": _named(shape.body)} for kind in shape.body_kinds}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _path_parts(route: Route) -> Iterator[dict[str, Any]]:
    for name in _PARTS.findall(route.path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _parameter(one: Parameter) -> dict[str, Any]:
    return {"name": one.name, "in": one.place, "description": one.text, "schema": dict(one.schema)}


def _responses(route: Route, shape: Shape) -> Iterator[tuple[str, dict[str, Any]]]:
    limited = _LIMITED if route.scope is not None else ()
    headers = ("X-Request-Id", *(["Location"] if shape.location else []), *limited)
    right: dict[str, Any] = {"description": "Done.", "headers": _headers(headers)}
    if shape.answer is not None:
        right["content"] = {kind: {"schema": _named(shape.answer)} for kind in shape.kinds}
    yield str(shape.status), right
    by_status: dict[int, list[str]] = {}
    for code in codes_of(route):
        by_status.setdefault(STATUS[code], []).append(code)
    for status in shape.refusals:
        by_status.setdefault(status, [])
    for status, codes in sorted(by_status.items()):
        names = ["X-Request-Id"]
        if status in (429, 503):
            names.append("Retry-After")
        if status == 401:
            names.append("WWW-Authenticate")
        if status == 429:
            names += limited
        schema: dict[str, Any] = {
            "allOf": [_named("Error"), {"properties": {"error": {"enum": codes}}}],
        }
        if status in shape.refusals:
            schema = {"anyOf": [_named(shape.refusals[status]), schema]}
        yield (
            str(status),
            {
                "description": ", ".join(f"`{code}`" for code in codes),
                "headers": _headers(names),
                "content": {"application/json": {"schema": schema}},
            },
        )


def _headers(names: Sequence[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _named(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}
