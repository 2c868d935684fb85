"""Submit, show, wait and list over HTTP."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote
from uuid import UUID

import psycopg
import pytest

from tests.api.server import Reply, Server, make_key, publish, running, settings

ECHO: dict[str, Any] = {"type": "echo", "payload": {"a": 1}}


@dataclass
class Door:
    server: Server
    key: str
    db: psycopg.AsyncConnection[Any]
    node: int

    def submit(self, body: object = ECHO, path: str = "/jobs", **headers: str) -> Reply:
        return self.server.send("POST", path, key=self.key, body=body, headers=headers)

    def get(self, path: str, key: str | None = None) -> Reply:
        return self.server.send("GET", path, key=key or self.key)


@pytest.fixture
async def door(database_url: str, db: psycopg.AsyncConnection) -> AsyncIterator[Door]:
    node = await publish(db)
    key, _ = await make_key(db)
    with running(settings(database_url, workers=1, max_wait_s=20)) as server:
        yield Door(server, key, db, node)


async def finish(door: Door, job_id: str, result: str = '{"done":true}') -> None:
    """End a waiting job as a worker would."""
    await door.db.execute(
        """
        with gone as (delete from taskd.queue where id = %(id)s returning *)
        insert into taskd.outcomes (id, finished_at, started_at, run_at, node, claim, attempts, max_attempts,
                                    status, result)
        select id, now(), now(), run_at, %(node)s, 7, 1, max_attempts, 'completed', %(result)s from gone
        """,
        {"id": job_id, "node": door.node, "result": result},
    )


async def test_a_submit_answers_the_documented_members_first(door: Door) -> None:
    reply = door.submit()

    job_id = reply.body["job_id"]
    assert reply.status == 200
    assert list(reply.body) == ["message", "id", "job_id", "status", "scheduled_at", "duplicate", "warnings"]
    assert reply.body["message"] == "Message successfully received"
    assert reply.body["id"] == f"Message of id: {job_id}"
    assert reply.body["warnings"] == []
    assert reply.headers["location"] == f"/jobs/{job_id}"
    assert {"ratelimit-limit", "ratelimit-remaining", "ratelimit-reset"} <= set(reply.headers)


async def test_a_job_is_shown_with_the_documented_members_first(door: Door) -> None:
    job_id = door.submit({**ECHO, "tags": ["x"], "meta": {"m": 1}, "delay": 60}).body["job_id"]

    shown = door.get(f"/jobs/{job_id}").body
    by_text = door.get(f"/jobs/{quote(f'Message of id: {job_id}')}").body

    assert list(shown)[:9] == [
        "id",
        "type",
        "payload",
        "status",
        "attempts",
        "max_attempts",
        "created_at",
        "scheduled_at",
        "error_message",
    ]
    assert shown == by_text
    assert shown["payload"] == {"a": 1}
    assert (shown["status"], shown["tags"], shown["meta"]) == ("scheduled", ["x"], {"m": 1})
    assert shown["created_at"].endswith("Z")


async def test_scheduled_at_is_the_time_that_was_stored(door: Door) -> None:
    asked: list[tuple[dict[str, Any], str]] = [
        ({}, "pending"),
        ({"delay": 3600.5}, "scheduled"),
        ({"delay": 0.0004}, "pending"),  # less than a millisecond is none
        ({"run_at": "2020-01-01T00:00:00Z"}, "pending"),
    ]
    for options, status in asked:
        answered = door.submit({**ECHO, **options}).body
        stored = door.get(f"/jobs/{answered['job_id']}").body

        assert (answered["scheduled_at"], answered["status"]) == (stored["scheduled_at"], status)
        assert stored["created_at"] <= stored["scheduled_at"]


async def test_numbers_of_a_payload_come_back_exact(door: Door) -> None:
    body = (
        b'{"type":"echo","payload":{"i":9223372036854775808,"d":0.10000000000000000001,"e":"\\ud83d\\ude00"}}'
    )

    job_id = door.submit(body).body["job_id"]

    raw = door.get(f"/jobs/{job_id}").raw
    assert b"9223372036854775808" in raw
    assert b"0.10000000000000000001" in raw


async def test_a_second_submit_with_the_key_shows_the_first_job(door: Door) -> None:
    first = door.submit({**ECHO, "unique_key": "k"})
    second = door.submit(ECHO, **{"Idempotency-Key": "k"})
    other = door.submit({"type": "echo", "payload": {"a": 2}, "unique_key": "k"})

    assert second.body["job_id"] == first.body["job_id"]
    assert (first.body["duplicate"], second.body["duplicate"]) == (False, True)
    assert (other.status, other.body["error"]) == (409, "conflict")
    assert other.body["job_id"] == first.body["job_id"]


async def test_many_submits_with_one_key_store_one_job(door: Door) -> None:
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda _: door.submit({**ECHO, "unique_key": "k"}), range(32)))

    assert {reply.status for reply in replies} == {200}
    assert len({reply.body["job_id"] for reply in replies}) == 1
    assert [reply.body["duplicate"] for reply in replies].count(False) == 1


async def test_wait_answers_when_the_job_is_finished(door: Door) -> None:
    job_id = door.submit().body["job_id"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(door.get, f"/jobs/{job_id}?wait=15")
        await finish(door, job_id)
        shown = waiting.result(10).body

    assert (shown["status"], shown["result"], shown["attempts"]) == ("completed", {"done": True}, 1)


async def test_a_submit_that_waits_adds_the_outcome(door: Door) -> None:
    reply = door.submit(ECHO, "/jobs?wait=0.1")

    assert reply.status == 200
    assert reply.body["status"] == "pending"
    assert {"result", "error_message", "attempts"} <= set(reply.body)


async def test_a_wait_that_is_no_number_of_seconds_is_refused(door: Door) -> None:
    for wait in ("-1", "61", "x", "1e1", ""):
        reply = door.submit(ECHO, f"/jobs?wait={wait}")

        assert (reply.status, reply.body["fields"][0]["path"]) == (400, "wait"), wait


async def test_the_list_pages_through_ones_own_jobs_newest_first(door: Door) -> None:
    ids = [door.submit().body["job_id"] for _ in range(5)]
    stranger, _ = await make_key(door.db)
    door.server.send("POST", "/jobs", key=stranger, body=ECHO)

    first = door.get("/jobs?limit=3").body
    second = door.get(f"/jobs?limit=3&cursor={first['next_cursor']}").body

    assert [job["id"] for job in first["jobs"] + second["jobs"]] == ids[::-1]
    assert second["next_cursor"] is None
    assert list(first) == ["jobs", "next_cursor"]


WRONG_FILTERS = {
    "limit=0": "limit",
    "limit=201": "limit",
    "cursor=x": "cursor",
    "status=odd": "status",
    "type=A": "type",
    "since=2026-01-01": "since",
    "stauts=failed": "stauts",
    "tag=a&tag=b": "tag",
}


async def test_a_wrong_filter_is_refused(door: Door) -> None:
    for query, path in WRONG_FILTERS.items():
        reply = door.get(f"/jobs?{query}")

        assert (reply.status, reply.body["fields"][0]["path"]) == (400, path), query


async def test_filters_narrow_the_list(door: Door) -> None:
    wanted = door.submit({**ECHO, "tags": ["red"], "unique_key": "k"}).body["job_id"]
    door.submit()

    for query in ("tag=red", "unique_key=k", "tag=red&status=pending&type=echo&since=2020-01-01T00:00:00Z"):
        assert [job["id"] for job in door.get(f"/jobs?{query}").body["jobs"]] == [wanted]
    assert door.get("/jobs?status=failed").body["jobs"] == []


async def test_a_type_without_a_live_node_is_accepted_with_a_warning(door: Door) -> None:
    await door.db.execute("update taskd.nodes set state = 'gone'")
    unserved = {"type": "resize", "payload": {"file": "a.png"}}
    end = time.monotonic() + 10  # the types are read once a second
    while time.monotonic() < end:
        reply = door.submit(unserved, "/jobs?wait=0.05")
        if reply.body["warnings"]:
            break

    assert (reply.status, reply.body["warnings"]) == (200, ["no_worker"])
    assert door.submit({"type": "resize", "payload": {"file": "../x"}}).body["error"] == "invalid_payload"


async def test_a_payload_is_refused_with_every_wrong_member(door: Door) -> None:
    reply = door.submit({"type": "send_email", "payload": {"to": 1, "cc_": []}})

    paths = {field["path"] for field in reply.body["fields"]}
    assert reply.body["error"] == "invalid_payload"
    assert {"payload.to", "payload.subject", "payload.cc_"} <= paths


async def test_unknown_types_options_and_scopes_are_refused(door: Door) -> None:
    email_only, _ = await make_key(door.db, types=["send_email"])
    reader, _ = await make_key(door.db, scopes=["jobs:read"])

    assert door.submit({"type": "nope", "payload": {}}).body["error"] == "unknown_type"
    assert door.submit({**ECHO, "timeout": 301}).body["fields"][0]["path"] == "timeout"
    assert door.submit({**ECHO, "notify": {"url": "https://x.example"}}).status == 400
    assert door.server.send("POST", "/jobs", key=email_only, body=ECHO).body["error"] == "forbidden"
    assert door.server.send("POST", "/jobs", key=reader, body=b"{").body["error"] == "forbidden"


async def test_before_any_publication_a_submit_is_not_ready(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    key, _ = await make_key(db)
    with running(settings(database_url, workers=1)) as server:
        early = server.send("POST", "/jobs", key=key, body=ECHO)
        await publish(db)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            later = server.send("POST", "/jobs", key=key, body=ECHO)
            if later.status == 200:
                break

    assert (early.status, early.body["error"]) == (503, "not_ready")
    assert early.headers["retry-after"] == "1"
    assert str(UUID(later.body["job_id"])) == later.body["job_id"]
