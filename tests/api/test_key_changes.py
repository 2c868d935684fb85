"""What operators do to keys that are there: change, rotate, revoke, and the log of it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from tests.api.server import Server, make_key, publish, running, settings

ECHO: dict[str, Any] = {"type": "echo", "payload": {}}
NOBODY = "00000000-0000-4000-8000-000000000000"
AT_ONCE_S = 1.0
"""Well below what a process believes by itself, so that only the hint can be the reason."""


@pytest.fixture
async def server(database_url: str, db: psycopg.AsyncConnection) -> AsyncIterator[Server]:
    await publish(db)
    with running(settings(database_url)) as server:
        yield server


def make(server: Server, **members: Any) -> dict[str, Any]:
    made: dict[str, Any] = server.admin("POST", "/admin/api-keys", {"name": "shop", **members}).body
    return made


def until_status(server: Server, key: str, status: int) -> float:
    """Return how long it took, in seconds, until every one of ten requests in a row had this status."""
    began = time.monotonic()
    in_a_row = 0
    while in_a_row < 10:
        in_a_row = in_a_row + 1 if server.send("GET", "/jobs", key=key).status == status else 0
        assert time.monotonic() - began < 5
    return time.monotonic() - began


async def test_a_change_sets_what_it_names_and_leaves_the_rest(server: Server) -> None:
    made = make(server, description="d", rate_limit={"rate": 7, "burst": 9}, max_pending=3, types=["echo"])
    path = f"/admin/api-keys/{made['id']}"

    changed = server.admin("PATCH", path, {"name": "new", "rate_limit": {"burst": 20}, "types": None})
    reset = server.admin("PATCH", path, {"rate_limit": None, "max_pending": None, "description": None})

    assert (changed.status, reset.status) == (200, 200)
    assert changed.body["name"] == "new"
    assert changed.body["rate_limit"] == {"rate": 7.0, "burst": 20}
    assert (changed.body["types"], changed.body["max_pending"], changed.body["description"]) == (None, 3, "d")
    assert reset.body["rate_limit"] == {"rate": None, "burst": None}
    assert (reset.body["max_pending"], reset.body["description"]) == (None, None)
    assert server.admin("GET", path).body == reset.body
    assert "key" not in reset.body


async def test_a_change_of_scopes_holds_in_every_process_at_once(server: Server) -> None:
    made = make(server)
    until_status(server, made["key"], 200)

    server.admin("PATCH", f"/admin/api-keys/{made['id']}", {"scopes": ["jobs:write"]})

    assert until_status(server, made["key"], 403) < AT_ONCE_S


async def test_a_change_that_is_refused_changes_nothing(server: Server) -> None:
    made = make(server)
    path = f"/admin/api-keys/{made['id']}"
    before = server.admin("GET", path).body

    wrong = server.admin("PATCH", path, {"name": "new", "rate_limit": {"rate": -1}, "prefix": "x"})

    assert (wrong.status, wrong.body["error"]) == (400, "invalid_field")
    assert [field["path"] for field in wrong.body["fields"]] == ["rate_limit.rate", "prefix"]
    assert server.admin("GET", path).body == before
    assert server.admin("PATCH", f"/admin/api-keys/{NOBODY}", {}).status == 404
    assert server.admin("PATCH", "/admin/api-keys/nonsense", {}).status == 404


async def test_a_revoked_key_is_neither_changed_nor_rotated(server: Server) -> None:
    made = make(server)
    path = f"/admin/api-keys/{made['id']}"
    server.admin("DELETE", path)

    changed = server.admin("PATCH", path, {"name": "new"})
    rotated = server.admin("POST", f"{path}/rotate", {})

    assert (changed.status, changed.body["error"]) == (409, "conflict")
    assert (rotated.status, rotated.body["error"]) == (409, "conflict")


async def test_a_higher_limit_ends_a_long_refusal(server: Server) -> None:
    made = make(server, rate_limit={"rate": 0.0001, "burst": 1})
    until_status(server, made["key"], 429)

    server.admin("PATCH", f"/admin/api-keys/{made['id']}", {"rate_limit": {"rate": 1000, "burst": 1000}})

    assert until_status(server, made["key"], 200) < 2


async def test_a_rotation_answers_as_a_new_key_of_the_same_client(server: Server) -> None:
    made = make(server, prefix="shop", scopes=["jobs:write"], types=["echo"], max_pending=7)

    rotated = server.admin("POST", f"/admin/api-keys/{made['id']}/rotate", {"overlap": "24h"})

    assert rotated.status == 201
    assert list(rotated.body)[:5] == ["id", "name", "key", "created_at", "warning"]
    assert rotated.body["key"] != made["key"]
    for member in ("name", "prefix", "client", "scopes", "types", "max_pending", "rate_limit", "expires_at"):
        assert rotated.body[member] == made[member], member
    assert rotated.body["rotated_from"] == made["id"]
    assert rotated.body["replaces"]["id"] == made["id"]
    ends = datetime.fromisoformat(rotated.body["replaces"]["expires_at"])
    assert timedelta(hours=23) < ends - datetime.now(UTC) <= timedelta(hours=24)
    job = server.send("POST", "/jobs", key=made["key"], body=ECHO).body["job_id"]
    assert server.send("POST", "/jobs", key=rotated.body["key"], body=ECHO).status == 200
    read = server.admin("PATCH", f"/admin/api-keys/{rotated.body['id']}", {"scopes": ["jobs:read"]})
    assert read.status == 200
    until_status(server, rotated.body["key"], 200)
    assert server.send("GET", f"/jobs/{job}", key=rotated.body["key"]).status == 200


async def test_the_old_key_ends_with_the_overlap(server: Server) -> None:
    made = make(server)
    until_status(server, made["key"], 200)

    rotated = server.admin("POST", f"/admin/api-keys/{made['id']}/rotate", {"overlap": "0s"}).body

    assert until_status(server, made["key"], 401) < AT_ONCE_S
    assert server.send("GET", "/jobs", key=rotated["key"]).status == 200


async def test_a_rotation_makes_two_live_keys_at_most(server: Server) -> None:
    first = make(server)
    second = server.admin("POST", f"/admin/api-keys/{first['id']}/rotate", {}).body

    again = server.admin("POST", f"/admin/api-keys/{first['id']}/rotate", {})
    further = server.admin("POST", f"/admin/api-keys/{second['id']}/rotate", {})
    server.admin("DELETE", f"/admin/api-keys/{first['id']}")
    third = server.admin("POST", f"/admin/api-keys/{second['id']}/rotate", {})

    assert (again.status, again.body["error"]) == (409, "conflict")
    assert second["id"] in again.body["message"]
    assert further.status == 409
    assert first["id"] in further.body["message"]
    assert (third.status, third.body["client"]) == (201, first["client"])


async def test_a_rotated_key_lives_as_long_as_the_old_one_was_made_for(server: Server) -> None:
    ends = datetime.now(UTC) + timedelta(days=90)
    made = make(server, expires_at=ends.isoformat())

    rotated = server.admin("POST", f"/admin/api-keys/{made['id']}/rotate", {"overlap": "1h"}).body
    server.admin("DELETE", f"/admin/api-keys/{made['id']}")
    forever = server.admin("POST", f"/admin/api-keys/{rotated['id']}/rotate", {"expires_at": None}).body

    assert abs(datetime.fromisoformat(rotated["expires_at"]) - ends) < timedelta(minutes=1)
    assert forever["expires_at"] is None


@pytest.mark.parametrize(
    ("body", "error", "path"),
    [
        pytest.param({"overlap": 24}, "invalid_field", "overlap", id="no unit"),
        pytest.param({"overlap": "1y"}, "invalid_field", "overlap", id="no such unit"),
        pytest.param({"overlp": "1h"}, "unknown_field", "overlp", id="misspelt"),
        pytest.param({"expires_at": "2001-01-01T00:00:00Z"}, "invalid_field", "expires_at", id="passed"),
    ],
)
async def test_a_wrong_rotation_makes_no_key(
    server: Server, body: dict[str, Any], error: str, path: str
) -> None:
    made = make(server)

    refused = server.admin("POST", f"/admin/api-keys/{made['id']}/rotate", body)

    assert (refused.status, refused.body["error"], refused.body["fields"][0]["path"]) == (400, error, path)
    assert len(server.admin("GET", "/admin/api-keys").body["Keys"]) == 1


async def test_whatever_changes_a_key_is_in_the_audit_with_who_and_where_from(server: Server) -> None:
    made = make(server)
    path = f"/admin/api-keys/{made['id']}"
    changed = server.admin("PATCH", path, {"name": "new", "rate_limit": {"rate": 5}})
    server.admin("PATCH", path, {"name": "new"})
    rotated = server.admin("POST", f"{path}/rotate", {"overlap": "1h"})
    server.admin("DELETE", path)
    server.admin("DELETE", path)
    server.admin("PATCH", path, {"name": "refused"})

    entries = server.admin("GET", "/admin/audit").body["entries"]

    assert [entry["action"] for entry in entries] == ["key.revoke", "key.rotate", "key.change", "key.create"]
    assert {entry["target"] for entry in entries} == {made["id"]}
    assert {(entry["actor"], entry["address"]) for entry in entries} == {("admin", "127.0.0.1")}
    assert entries[2]["request_id"] == changed.headers["x-request-id"]
    assert entries[2]["detail"]["changes"] == {"name": ["shop", "new"], "rate": [None, 5.0]}
    assert entries[1]["detail"]["new_key"] == rotated.body["id"]
    assert rotated.body["key"] not in str(entries)
    assert made["key"] not in str(entries)


async def test_the_audit_is_read_page_by_page(server: Server) -> None:
    for _ in range(5):
        make(server)

    ids, cursor = [], ""
    while True:
        page = server.admin("GET", f"/admin/audit?limit=2{cursor}").body
        ids += [entry["id"] for entry in page["entries"]]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"

    assert len(ids) == len(set(ids)) == 5
    assert [int(one) for one in ids] == sorted(map(int, ids), reverse=True)
    for query in ("limit=0", "limit=201", "limit=x", "cursor=x", "cursor=-1", "actor=a", "limit=1&limit=1"):
        assert server.admin("GET", f"/admin/audit?{query}").status == 400, query


async def test_no_more_jobs_of_a_client_wait_than_its_key_may_have(
    server: Server, db: psycopg.AsyncConnection
) -> None:
    made = make(server, max_pending=3, rate_limit={"rate": 10_000, "burst": 10_000})
    other, _ = await make_key(db)

    replies = []
    began = time.monotonic()
    while time.monotonic() - began < 1.5:
        replies.append(server.send("POST", "/jobs", key=made["key"], body=ECHO))
    refused = replies[-1]

    # Each of the two processes counts for itself until it counts anew, within a second.
    assert [reply.status for reply in replies[:3]] == [200] * 3
    assert sum(reply.status == 200 for reply in replies) <= 6
    assert {reply.status for reply in replies[-10:]} == {429}
    assert (refused.status, refused.body["error"]) == (429, "backlog_full")
    assert int(refused.headers["retry-after"]) >= 1
    assert server.send("GET", "/jobs", key=made["key"]).status == 200
    assert server.send("POST", "/jobs", key=other, body=ECHO).status == 200
    await db.execute("update taskd.queue set claimed = true")
    began = time.monotonic()
    while server.send("POST", "/jobs", key=made["key"], body=ECHO).status != 200:
        assert time.monotonic() - began < 1.5


async def test_no_more_jobs_of_a_type_wait_than_its_backlog_allows(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    from taskd.model.jobtype import TypeInfo

    bounded = TypeInfo(name="echo", handler="echo", plugin="builtin", schema={}, max_backlog=2)
    free = TypeInfo(name="free", handler="echo", plugin="builtin", schema={})
    await publish(db, [bounded, free])
    key, _ = await make_key(db)
    with running(settings(database_url, workers=1)) as server:
        statuses = [server.send("POST", "/jobs", key=key, body=ECHO).status for _ in range(4)]
        other = server.send("POST", "/jobs", key=key, body={"type": "free", "payload": {}}).status

    assert statuses == [200, 200, 429, 429]
    assert other == 200
