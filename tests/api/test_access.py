"""Who may call what, over all routes that there are: no route is forgotten, since the table is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

import psycopg
import pytest

from taskd.api.app import ROUTES
from taskd.api.route import Route
from taskd.service.keyask import SCOPES
from tests.api.server import ADMIN, Server, make_key, publish, running, settings

OPEN = [route for route in ROUTES if route.scope is None and not route.admin]
SCOPED = [route for route in ROUTES if route.scope is not None]
ADMINS = [route for route in ROUTES if route.admin]
NOBODY = str(UUID(int=0))


def shown(route: Route) -> str:
    return f"{route.method} {route.shown_path}"


def path(route: Route) -> str:
    return route.shown_path.replace("{id}", NOBODY).replace("{file}", "page.css")


@dataclass
class Door:
    server: Server
    keys: dict[str, str]
    """A key with every scope but this one."""


@pytest.fixture
async def door(database_url: str, db: psycopg.AsyncConnection) -> AsyncIterator[Door]:
    await publish(db)
    keys = {
        scope: (await make_key(db, scopes=[other for other in SCOPES if other != scope]))[0]
        for scope in SCOPES
    }
    with running(settings(database_url, workers=1)) as server:
        yield Door(server, keys)


async def test_every_route_asks_for_what_its_row_says(door: Door) -> None:
    """One server for all routes: a start for each of them would take minutes."""
    send = door.server.send
    for route in SCOPED:
        assert route.scope is not None
        without = send(route.method, path(route), body={}).status
        lacking = send(route.method, path(route), key=door.keys[route.scope], body={})
        other = next(key for scope, key in door.keys.items() if scope != route.scope)
        having = send(route.method, path(route), key=other, body={}).status
        token = send(route.method, path(route), body={}, headers={"Authorization": f"Bearer {ADMIN}"}).status

        assert (without, token) == (401, 401), shown(route)
        assert (lacking.status, lacking.body["error"]) == (403, "forbidden"), shown(route)
        assert having not in (401, 403, 500), shown(route)
    for route in ADMINS:
        without = send(route.method, path(route), body={}).status
        key = send(route.method, path(route), key=door.keys[SCOPES[0]], body={}).status
        token = door.server.admin(route.method, path(route), {}).status

        assert (without, key) == (401, 401), shown(route)
        assert token not in (401, 403, 500), shown(route)
    for route in OPEN:
        assert send(route.method, path(route)).status in (200, 503), shown(route)


async def test_a_key_for_some_types_sees_and_submits_these_alone(
    door: Door, db: psycopg.AsyncConnection
) -> None:
    every, stored = await make_key(db)
    some, _ = await make_key(db, client=stored.client, types=["echo"])
    mail = {"type": "resize", "payload": {"file": "a.png"}}
    echo = {"type": "echo", "payload": {}}
    send = door.server.send
    theirs = send("POST", "/jobs", key=every, body=mail).body["job_id"]

    refused = send("POST", "/jobs", key=some, body=mail)
    accepted = send("POST", "/jobs", key=some, body=echo)
    listed = send("GET", "/jobs", key=some).body["jobs"]

    assert (refused.status, refused.body["fields"][0]["path"]) == (403, "type")
    assert accepted.status == 200
    assert [job["id"] for job in listed] == [accepted.body["job_id"]]
    assert send("GET", f"/jobs/{theirs}", key=some).status == 404
    assert send("GET", f"/jobs/{theirs}", key=every).status == 200


async def test_an_expired_key_stops_working_within_two_seconds(
    door: Door, db: psycopg.AsyncConnection
) -> None:
    ends = datetime.now(UTC) + timedelta(seconds=1)
    key, _ = await make_key(db, expires_at=ends)
    assert door.server.send("GET", "/jobs", key=key).status == 200

    last = ends
    while datetime.now(UTC) < ends + timedelta(seconds=2.5):
        if door.server.send("GET", "/jobs", key=key).status == 200:
            last = datetime.now(UTC)

    assert last < ends + timedelta(seconds=2)


async def test_both_admin_tokens_work_while_they_are_rotated(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    from taskd.api.settings import admin_digest

    tokens = ("the-old-token-of-the-tests-0123456789", "the-new-token-of-the-tests-0123456789")
    given = settings(database_url, workers=1, admin_digests=tuple(map(admin_digest, tokens)))
    with running(given) as server:
        statuses = [
            server.send("GET", "/admin/api-keys", headers={"Authorization": f"{scheme} {token}"}).status
            for scheme, token in (
                ("Bearer", tokens[0]),
                ("bearer", tokens[1]),
                ("Bearer", ADMIN),
                ("Basic", tokens[0]),
                ("Bearer", ""),
            )
        ]

    assert statuses == [200, 200, 401, 401, 401]
