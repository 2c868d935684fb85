"""API keys over HTTP, and who is let in."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

from taskd.model import apikey
from tests.api.server import ADMIN, Server, make_key, publish, running, settings

ECHO: dict[str, Any] = {"type": "echo", "payload": {}}
WRONG = apikey.make("tk", bytes(range(48))).text.decode()


@pytest.fixture
async def server(database_url: str, db: psycopg.AsyncConnection) -> AsyncIterator[Server]:
    await publish(db)
    with running(settings(database_url)) as server:
        yield server


async def test_a_key_is_shown_once_and_works_at_once(server: Server) -> None:
    made = server.admin("POST", "/admin/api-keys", {"name": "shop", "prefix": "shop"})
    listed = server.admin("GET", "/admin/api-keys")
    shown = server.admin("GET", f"/admin/api-keys/{made.body['id']}")

    assert made.status == 201
    assert list(made.body)[:5] == ["id", "name", "key", "created_at", "warning"]
    assert made.body["warning"] == "Save this key securely. It wont be shown again"
    assert list(listed.body) == ["Message", "Keys"]
    first = ["id", "name", "key_hash", "created_at", "last_used_at", "expires_at"]
    assert list(listed.body["Keys"][0])[:6] == first
    assert listed.body["Keys"][0]["key_hash"].startswith("fp_")
    assert made.body["key"].encode() not in listed.raw + shown.raw
    assert server.send("POST", "/jobs", key=made.body["key"], body=ECHO).status == 200


async def test_a_revoked_key_stops_working_within_two_seconds(server: Server) -> None:
    made = server.admin("POST", "/admin/api-keys", {"name": "a"}).body
    assert server.send("POST", "/jobs", key=made["key"], body=ECHO).status == 200

    gone = server.admin("DELETE", f"/admin/api-keys/{made['id']}")
    began = time.monotonic()
    last = began
    while time.monotonic() - began < 3:
        if server.send("POST", "/jobs", key=made["key"], body=ECHO).status == 200:
            last = time.monotonic()

    assert (gone.status, gone.raw) == (204, b"")
    assert last - began < 2
    assert server.admin("DELETE", f"/admin/api-keys/{made['id']}").status == 204
    assert server.admin("GET", "/admin/api-keys/00000000-0000-4000-8000-000000000000").status == 404


async def test_a_key_with_wrong_members_is_refused(server: Server) -> None:
    for members, error, path in (
        ({}, "missing_field", "name"),
        ({"name": "a", "prefix": "A"}, "invalid_field", "prefix"),
        ({"name": "a", "scopes": ["admin"]}, "invalid_field", "scopes[0]"),
        ({"name": "a", "rate_limit": {"rate": 0}}, "invalid_field", "rate_limit.rate"),
        ({"name": "a", "expires_at": "2001-01-01T00:00:00Z"}, "invalid_field", "expires_at"),
        ({"name": "a", "client": "00000000-0000-4000-8000-000000000000"}, "invalid_field", "client"),
    ):
        reply = server.admin("POST", "/admin/api-keys", members)

        assert (reply.status, reply.body["error"], reply.body["fields"][0]["path"]) == (400, error, path)


async def test_a_second_key_of_a_client_sees_its_jobs(server: Server) -> None:
    one = server.admin("POST", "/admin/api-keys", {"name": "one"}).body
    two = server.admin("POST", "/admin/api-keys", {"name": "two", "client": one["client"]}).body
    job = server.send("POST", "/jobs", key=one["key"], body=ECHO).body["job_id"]

    assert server.send("GET", f"/jobs/{job}", key=two["key"]).status == 200


async def test_the_301st_wrong_key_is_limited_and_right_keys_go_on(
    server: Server, db: psycopg.AsyncConnection
) -> None:
    right, _ = await make_key(db)

    statuses = [server.send("POST", "/jobs", key=WRONG, body=ECHO).status for _ in range(301)]
    limited = server.send("POST", "/jobs", key=WRONG, body=ECHO)

    assert statuses == [401] * 300 + [429]
    assert limited.body["error"] == "rate_limited"
    assert int(limited.headers["retry-after"]) >= 1
    assert server.send("POST", "/jobs", key=right, body=ECHO).status == 200


async def test_the_eleventh_wrong_token_is_limited_and_right_ones_go_on(server: Server) -> None:
    wrong = {"Authorization": f"Bearer {ADMIN}x"}

    statuses = [server.send("GET", "/admin/api-keys", headers=wrong).status for _ in range(12)]

    assert statuses == [401] * 10 + [429] * 2
    assert server.admin("GET", "/admin/api-keys").status == 200


async def test_hostile_key_headers_are_no_500(server: Server) -> None:
    for value in (b"\xff\xfe", b"", b"tk-", b"x" * 4000, WRONG[:-1].encode() + b"\xe9", b"a\tb"):
        raw = server.raw(
            b"GET /jobs HTTP/1.1\r\nHost: t\r\nConnection: close\r\nX-API-Key: " + value + b"\r\n\r\n"
        )
        assert raw.startswith(b"HTTP/1.1 401 "), value
    two = b"GET /jobs HTTP/1.1\r\nHost: t\r\nConnection: close\r\nX-API-Key: a\r\nX-API-Key: b\r\n\r\n"
    assert server.raw(two).startswith(b"HTTP/1.1 401 ")
    token = (
        b"GET /admin/api-keys HTTP/1.1\r\nHost: t\r\nConnection: close\r\nAuthorization: Bearer \xff\r\n\r\n"
    )
    assert server.raw(token).startswith(b"HTTP/1.1 401 ")


async def test_a_retry_after_is_true(server: Server, db: psycopg.AsyncConnection) -> None:
    key, _ = await make_key(db, rate=2, burst=3)

    replies = [server.send("POST", "/jobs", key=key, body=ECHO) for _ in range(5)]
    refused = [reply for reply in replies if reply.status == 429]
    after = int(refused[-1].headers["retry-after"])
    end = time.monotonic() + after
    while time.monotonic() < end:
        server.send("GET", "/health")

    assert len(refused) == 2
    assert after >= 1
    assert server.send("POST", "/jobs", key=key, body=ECHO).status == 200
    assert refused[-1].headers["ratelimit-remaining"] == "0"
