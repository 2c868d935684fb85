"""The description of the API is that of the code: every route, every member, every status."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import jsonschema_rs
import psycopg
import pytest
from click.testing import CliRunner
from openapi_spec_validator import validate

from taskd.api import openapi
from taskd.api.answers import STATUS
from taskd.api.app import ROUTES
from taskd.api.route import Route
from taskd.api.routes.docs import CSP
from taskd.api.shapes import SCHEMAS, SHAPES
from taskd.cli import main
from taskd.model.submit import _MEMBERS as SUBMIT_MEMBERS
from taskd.service import keyask
from tests.api.server import Reply, Server, make_key, publish, running, settings

DOCUMENT: dict[str, Any] = json.loads(openapi.encoded(ROUTES))
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
}

ECHO: dict[str, Any] = {"type": "echo", "payload": {}}


def shown(route: Route) -> str:
    return f"{route.method} {route.shown_path}"


def validator(schema: dict[str, Any]) -> Any:
    """A validator of a schema of the document, which refers to the others by their place in it."""
    return jsonschema_rs.Draft202012Validator(
        {**schema, "components": DOCUMENT["components"]}, validate_formats=True
    )


def problems(reply: Reply, what: str) -> list[str]:
    """Return in what an answer differs from what is described for this route."""
    response = OPERATIONS[what]["responses"].get(str(reply.status))
    if response is None:
        return [f"{what}: {reply.status} is not described"]
    found = [
        f"{what}: {name} is missing or not described"
        for name in ("x-request-id", "retry-after", "www-authenticate", "location", "ratelimit-limit")
        if (name in reply.headers) != (name in {header.lower() for header in response["headers"]})
        # A request is refused for its key before there is a limit, and for its limit before all else.
        and not (name == "ratelimit-limit" and reply.status >= 400)
    ]
    if "content" not in response:
        return found if reply.raw == b"" else [f"{what}: has a body"]
    kind = reply.headers["content-type"].partition(";")[0]
    schema = response["content"][kind]["schema"]
    value = reply.body if kind == "application/json" else reply.raw.decode()
    return found + [f"{what}: {error}" for error in validator(schema).iter_errors(value)]


def test_the_document_is_valid_openapi() -> None:
    validate(DOCUMENT)


def test_every_route_is_described_and_nothing_else() -> None:
    assert sorted(OPERATIONS) == sorted(map(shown, ROUTES))


@pytest.mark.parametrize("route", ROUTES, ids=shown)
def test_a_route_has_a_shape_of_its_own_in_shapes_py(route: Route) -> None:
    shape = SHAPES[shown(route)]

    assert (shape.body is not None) == route.body
    assert {shape.answer, shape.body, *shape.refusals.values()} <= {*SCHEMAS, None}


def test_every_shape_has_a_route() -> None:
    assert set(SHAPES) == set(map(shown, ROUTES))


@pytest.mark.parametrize("route", ROUTES, ids=shown)
def test_a_route_asks_for_the_key_or_the_token_that_it_needs(route: Route) -> None:
    wanted: list[dict[str, list[str]]] = (
        [{"key": []}] if route.scope else [{"admin": []}] if route.admin else []
    )

    assert OPERATIONS[shown(route)]["security"] == wanted


@pytest.mark.parametrize("what", OPERATIONS)
def test_the_codes_of_a_route_stand_at_their_status(what: str) -> None:
    for status, response in OPERATIONS[what]["responses"].items():
        for code in re.findall(r"`(\w+)`", response["description"]):
            assert STATUS[code] == int(status)


def test_every_code_is_described() -> None:
    described = {
        code
        for operation in OPERATIONS.values()
        for response in operation["responses"].values()
        for code in re.findall(r"`(\w+)`", response["description"])
    }

    # No route answers the first; the other comes with webhooks.
    assert set(STATUS) - described == {"method_not_allowed", "blocked_url"}
    assert DOCUMENT["components"]["schemas"]["Error"]["properties"]["error"]["enum"] == list(STATUS)


@pytest.mark.parametrize(
    ("schema", "members"),
    [
        pytest.param("SubmitJob", SUBMIT_MEMBERS, id="submit"),
        pytest.param("NewKey", keyask._MEMBERS, id="create"),
        pytest.param("ChangeKey", keyask._CHANGES, id="change"),
        pytest.param("RotateKey", keyask._ROTATION, id="rotate"),
    ],
)
def test_a_body_has_the_members_that_its_reader_knows(schema: str, members: dict[str, Any]) -> None:
    assert set(SCHEMAS[schema]["properties"]) == set(members)


def test_operations_have_names_of_their_own() -> None:
    names = [operation["operationId"] for operation in OPERATIONS.values()]

    assert len(set(names)) == len(names)


def test_the_command_prints_the_same_document() -> None:
    done = CliRunner().invoke(main, ["openapi"])

    assert (done.exit_code, json.loads(done.stdout)) == (0, DOCUMENT)


@pytest.fixture
async def server(database_url: str, db: psycopg.AsyncConnection) -> AsyncIterator[Server]:
    await publish(db)
    with running(settings(database_url, workers=1)) as server:
        yield server


async def test_real_answers_are_as_described(server: Server, db: psycopg.AsyncConnection) -> None:
    key, _ = await make_key(db)
    send, admin = server.send, server.admin
    made = admin("POST", "/admin/api-keys", {"name": "a", "types": ["echo"], "rate_limit": {"rate": 5}})
    key_id = made.body["id"]
    job = {"type": "echo", "payload": {"a": 1}, "tags": ["t"], "meta": {"m": None}, "unique_key": "u"}
    submitted = send("POST", "/jobs", key=key, body=job)
    job_id = submitted.body["job_id"]
    await db.execute(
        "insert into taskd.history (job_id, attempt, ended_at, cause) values (%s, 1, now(), 'error')",
        [job_id],
    )
    replies: list[tuple[str, Reply]] = [
        ("GET /health", send("GET", "/health")),
        ("GET /ready", send("GET", "/ready")),
        ("GET /openapi.json", send("GET", "/openapi.json")),
        ("GET /docs", send("GET", "/docs")),
        ("GET /docs/{file}", send("GET", "/docs/page.css")),
        ("GET /docs/{file}", send("GET", "/docs/page.js")),
        ("GET /docs/{file}", send("GET", "/docs/../page.js")),
        ("POST /jobs", submitted),
        ("POST /jobs", send("POST", "/jobs?wait=0.1", key=key, body=job)),
        ("POST /jobs", send("POST", "/jobs", key=key, body={**job, "payload": {}})),
        ("POST /jobs", send("POST", "/jobs", key=key, body={"type": "nope", "payload": {}})),
        ("POST /jobs", send("POST", "/jobs", key=made.body["key"], body={"type": "resize", "payload": {}})),
        ("POST /jobs", send("POST", "/jobs", body={})),
        ("POST /jobs", send("POST", "/jobs", key=key, body=b"{", headers={"Content-Type": "text/plain"})),
        ("POST /jobs/bulk", send("POST", "/jobs/bulk", key=key, body={"jobs": [job, ECHO]})),
        ("POST /jobs/bulk", send("POST", "/jobs/bulk", key=key, body={"jobs": [{}]})),
        ("GET /jobs", send("GET", "/jobs", key=key)),
        ("GET /jobs", send("GET", "/jobs?limit=0", key=key)),
        ("GET /jobs/{id}", send("GET", f"/jobs/{job_id}", key=key)),
        ("GET /jobs/{id}", send("GET", "/jobs/nonsense", key=key)),
        ("POST /admin/api-keys", made),
        ("POST /admin/api-keys", admin("POST", "/admin/api-keys", {})),
        ("GET /admin/api-keys", admin("GET", "/admin/api-keys")),
        ("GET /admin/api-keys", send("GET", "/admin/api-keys")),
        ("GET /admin/api-keys/{id}", admin("GET", f"/admin/api-keys/{key_id}")),
        ("PATCH /admin/api-keys/{id}", admin("PATCH", f"/admin/api-keys/{key_id}", {"rate_limit": None})),
        ("POST /admin/api-keys/{id}/rotate", admin("POST", f"/admin/api-keys/{key_id}/rotate", {})),
        ("POST /admin/api-keys/{id}/rotate", admin("POST", f"/admin/api-keys/{key_id}/rotate", {})),
        ("DELETE /admin/api-keys/{id}", admin("DELETE", f"/admin/api-keys/{key_id}")),
        ("GET /admin/audit", admin("GET", "/admin/audit?limit=2")),
    ]

    assert [problem for what, reply in replies for problem in problems(reply, what)] == []
    right = {what for what, reply in replies if reply.status < 400}
    assert right == set(OPERATIONS)


async def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    page = server.send("GET", "/docs")
    text = page.raw.decode()

    assert page.headers["content-security-policy"] == CSP
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    loaded = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert sorted(set(loaded)) == ["/docs/icon.svg", "/docs/page.css", "/docs/page.js", "/openapi.json"]
    for path in loaded:
        assert server.send("GET", path).status == 200, path
    assert "<style" not in text
    assert not re.search(r"<script(?! src=)| on\w+=|style=", text)


def scripts() -> Iterator[str]:
    from importlib.resources import files

    for file in (files("taskd.api") / "static").iterdir():
        yield file.read_text(encoding="utf-8")


def test_the_script_makes_no_markup_of_text() -> None:
    for text in scripts():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", text)
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in text
