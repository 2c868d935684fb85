"""Bulks over HTTP: all of their jobs or none, each problem named by its path, each job paid for."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
import pytest

from tests.api.server import Reply, Server, count_jobs, make_key, publish, running, settings

ECHO: dict[str, Any] = {"type": "echo", "payload": {"a": 1}}
NDJSON = "application/x-ndjson"


@dataclass
class Door:
    server: Server
    key: str
    db: psycopg.AsyncConnection[Any]

    def send(self, body: object, *, key: str | None = None, **headers: str) -> Reply:
        return self.server.send("POST", "/jobs/bulk", key=key or self.key, body=body, headers=headers)

    def bulk(self, jobs: object, *, key: str | None = None, **headers: str) -> Reply:
        return self.send({"jobs": jobs}, key=key, **headers)

    def lines(self, body: bytes, kind: str = NDJSON) -> Reply:
        return self.send(body, **{"Content-Type": kind})


@pytest.fixture
async def door(database_url: str, db: psycopg.AsyncConnection) -> AsyncIterator[Door]:
    await publish(db)
    key, _ = await make_key(db, rate=1_000_000, burst=1_000_000)
    with running(settings(database_url, workers=1)) as server:
        yield Door(server, key, db)


def problem(reply: Reply) -> tuple[int, str, str]:
    return reply.status, reply.body["error"], reply.body["fields"][0]["path"]


# -- what is stored --------------------------------------------------------------------------------------


async def test_a_bulk_answers_an_id_for_each_job_in_order(door: Door) -> None:
    jobs = [{"type": "echo", "payload": {"n": n}} for n in range(1000)]

    reply = door.bulk(jobs)

    assert reply.status == 200
    assert list(reply.body)[:3] == ["message", "accepted", "jobs"]
    assert (reply.body["accepted"], len(reply.body["jobs"])) == (1000, 1000)
    assert all(list(one) == ["job_id", "duplicate"] and not one["duplicate"] for one in reply.body["jobs"])
    ids = [UUID(one["job_id"]) for one in reply.body["jobs"]]
    cursor = await door.db.execute("select id, (payload->>'n')::integer from taskd.jobs order by id")
    assert await cursor.fetchall() == list(zip(ids, range(1000), strict=True))


async def test_options_and_defaults_are_those_of_a_single_submit(door: Door) -> None:
    options = {
        "priority": 5,
        "delay": 60,
        "max_attempts": 9,
        "tags": ["x"],
        "meta": {"m": 1},
        "unique_key": "k",
    }
    reply = door.bulk([{**ECHO, **options}, ECHO])

    shown = [
        door.server.send("GET", f"/jobs/{one['job_id']}", key=door.key).body for one in reply.body["jobs"]
    ]
    assert {name: shown[0][name] for name in options if name != "delay"} == {
        name: value for name, value in options.items() if name != "delay"
    }
    assert (shown[0]["status"], shown[1]["status"]) == ("scheduled", "pending")
    assert (shown[1]["priority"], shown[1]["max_attempts"], shown[1]["unique_key"]) == (0, 3, None)


async def test_payloads_are_stored_as_they_were_written(door: Door) -> None:
    jobs = [b'{"type":"echo","payload":{"d":0.10000000000000000001}}', b'{"type":"echo","payload":{"e": 1}}']

    reply = door.send(b'{"jobs":[' + b",".join(jobs) + b"]}")

    cursor = await door.db.execute("select payload::text from taskd.jobs order by id")
    assert await cursor.fetchall() == [('{"d":0.10000000000000000001}',), ('{"e": 1}',)]
    assert reply.body["accepted"] == 2


async def test_a_bulk_of_lines_is_the_same(door: Door) -> None:
    lines = b'{"type":"echo","payload":{"n":0}}\r\n\n  {"type": "echo", "payload": {"n": 1}}\n'

    for kind in (NDJSON, "application/x-ndjson; charset=utf-8"):
        assert door.lines(lines, kind).body["accepted"] == 2

    cursor = await door.db.execute("select payload->>'n' from taskd.jobs order by id")
    assert [row[0] for row in await cursor.fetchall()] == ["0", "1"] * 2


# -- what is refused: all of it --------------------------------------------------------------------------

EMAIL: dict[str, Any] = {"type": "send_email", "payload": {"subject": "s", "body": "b"}}

BAD_JOBS = [
    pytest.param("jobs[3].payload.to", "invalid_payload", EMAIL, id="schema"),
    pytest.param("jobs[3].payload", "missing_field", {"type": "echo"}, id="missing"),
    pytest.param("jobs[3].type", "unknown_type", {"type": "nobody", "payload": {}}, id="unknown type"),
    pytest.param("jobs[3].type", "invalid_field", {"type": "taskd.x", "payload": {}}, id="reserved type"),
    pytest.param("jobs[3].payload", "invalid_field", {"type": "echo", "payload": []}, id="no object"),
    pytest.param("jobs[3].priority", "invalid_field", {**ECHO, "priority": 101}, id="option"),
    pytest.param("jobs[3].timeout", "invalid_field", {**ECHO, "timeout": 301}, id="timeout of the type"),
    pytest.param("jobs[3].pirority", "unknown_field", {**ECHO, "pirority": 1}, id="unknown member"),
    pytest.param(
        "jobs[3].run_at",
        "exclusive_fields",
        {**ECHO, "delay": 1, "run_at": "2026-01-01T00:00:00Z"},
        id="both",
    ),
    pytest.param("jobs[3]", "invalid_field", 5, id="no job"),
]


@pytest.mark.parametrize(("path", "code", "job"), BAD_JOBS)
async def test_one_bad_job_is_named_and_nothing_is_stored(
    door: Door, path: str, code: str, job: object
) -> None:
    jobs = [ECHO, ECHO, ECHO, job, ECHO]

    assert problem(door.bulk(jobs)) == (400, code, path)
    lines = b"\n".join(json.dumps(one).encode() for one in jobs)
    assert problem(door.lines(lines)) == (400, code, path)
    assert await count_jobs(door.db) == 0


BAD_BODIES = [
    pytest.param(b"{}", "missing_field", "jobs", id="no jobs"),
    pytest.param(b'{"jobs":[]}', "invalid_field", "jobs", id="empty"),
    pytest.param(b'{"jobs":{}}', "invalid_field", "jobs", id="no array"),
    pytest.param(b'{"jobs":[1],"wait":1}', "unknown_field", "wait", id="unknown member"),
    pytest.param(
        b'{"jobs":[{"type":"echo","payload":{"a":1,"a":2}}]}',
        "duplicate_key",
        "jobs[0].payload.a",
        id="duplicate",
    ),
    pytest.param(
        b'{"jobs":[{"type":"echo","payload":{"a":"\\u0000"}}]}',
        "unsupported_value",
        "jobs[0].payload.a",
        id="U+0000",
    ),
]


@pytest.mark.parametrize(("body", "code", "path"), BAD_BODIES)
async def test_a_body_that_is_no_bulk_is_refused(door: Door, body: bytes, code: str, path: str) -> None:
    assert problem(door.send(body)) == (400, code, path)


async def test_more_than_a_thousand_jobs_are_refused(door: Door) -> None:
    assert problem(door.bulk([ECHO] * 1001)) == (400, "invalid_field", "jobs")


def nested(levels: int) -> bytes:
    return b'{"type":"echo","payload":' + b'{"a":' * (levels - 1) + b"{}" + b"}" * (levels - 1) + b"}"


async def test_depth_is_counted_from_the_payload_object(door: Door) -> None:
    many = b'{"type":"echo","payload":{}},' * 100  # so that counts of brackets alone say nothing

    assert door.send(b'{"jobs":[' + many + nested(64) + b"]}").status == 200
    assert door.send(b'{"jobs":[' + many + nested(65) + b"]}").body["error"] == "too_deep"
    assert door.lines(nested(64)).status == 200
    assert door.lines(nested(65)).body["error"] == "too_deep"


BAD_LINES = [
    pytest.param(b'{"type":"echo"\n"payload":{}}', "jobs[0]", id="two halves of an object"),
    pytest.param(b'{"type":"echo","payload":{}},{"type":"echo"\n"payload":{}}', "jobs[0]", id="and one more"),
    pytest.param(
        b'{"type":"echo","payload":{}}\n{"type":"echo","payload":{}}]}', "jobs[1]", id="an end too many"
    ),
    pytest.param(b'{"type":"echo","payload":{}} {"type":"echo","payload":{}}', "jobs[0]", id="two on a line"),
    pytest.param(b'{"type":"echo","payload":{"a":"\n"}}', "jobs[0]", id="a line break in a text"),
    pytest.param(b'{"type":"echo","payload":{}}\n{"a":NaN}', "jobs[1]", id="NaN"),
]


@pytest.mark.parametrize(("lines", "path"), BAD_LINES)
async def test_each_line_is_json_of_its_own(door: Door, lines: bytes, path: str) -> None:
    assert problem(door.lines(lines)) == (400, "invalid_json", path)
    assert await count_jobs(door.db) == 0


async def test_no_lines_and_lines_that_are_no_text_are_no_json(door: Door) -> None:
    for lines in (b"", b" \n\n", b'{"type":"echo","payload":{"a":"\xff"}}'):
        assert door.lines(lines).body["error"] == "invalid_json", lines


async def test_lines_are_for_bulks_alone(door: Door) -> None:
    reply = door.server.send(
        "POST", "/jobs", key=door.key, body=b'{"type":"echo","payload":{}}', headers={"Content-Type": NDJSON}
    )

    assert (reply.status, reply.body["error"]) == (415, "unsupported_media_type")


async def test_an_idempotency_key_is_refused_since_it_would_protect_nothing(door: Door) -> None:
    assert problem(door.bulk([ECHO], **{"Idempotency-Key": "k"})) == (400, "invalid_field", "Idempotency-Key")


async def test_scope_and_types_of_the_key_hold(door: Door) -> None:
    reader, _ = await make_key(door.db, scopes=["jobs:read"])
    mailer, _ = await make_key(door.db, types=["send_email"])

    assert door.bulk([ECHO], key=reader).status == 403
    assert problem(door.bulk([ECHO], key=mailer)) == (403, "forbidden", "jobs[0].type")


# -- unique keys -----------------------------------------------------------------------------------------


async def test_a_bulk_sent_again_finds_its_jobs(door: Door) -> None:
    jobs = [{**ECHO, "unique_key": f"k{n}"} for n in range(50)]

    first, second = door.bulk(jobs).body["jobs"], door.bulk([*jobs, ECHO]).body["jobs"]

    assert [one["job_id"] for one in second[:50]] == [one["job_id"] for one in first]
    assert [one["duplicate"] for one in second] == [True] * 50 + [False]
    assert await count_jobs(door.db) == 51


async def test_a_key_that_repeats_within_a_bulk_is_a_duplicate_of_the_first(door: Door) -> None:
    jobs = door.bulk(
        [{**ECHO, "unique_key": "z"}, {**ECHO, "unique_key": "a"}, {**ECHO, "unique_key": "z"}]
    ).body["jobs"]

    assert [one["duplicate"] for one in jobs] == [False, False, True]
    assert jobs[2]["job_id"] == jobs[0]["job_id"]


async def test_a_conflict_is_named_and_nothing_is_stored(door: Door) -> None:
    held = door.bulk([{**ECHO, "unique_key": "k"}]).body["jobs"][0]["job_id"]
    other = {"type": "echo", "payload": {"a": 2}, "unique_key": "k"}

    before = door.bulk([ECHO, {**ECHO, "unique_key": "new"}, other])
    within = door.bulk([{**ECHO, "unique_key": "x"}, {**ECHO, "unique_key": "x", "priority": 1}])

    assert problem(before) == (409, "conflict", "jobs[2].unique_key")
    assert before.body["job_id"] == held
    assert problem(within) == (409, "conflict", "jobs[1].unique_key")
    assert await count_jobs(door.db) == 1
    assert door.bulk([{**other, "unique_key": "new"}, {**other, "unique_key": "x"}]).status == 200


async def test_bulks_with_the_same_keys_at_once_store_each_job_once(door: Door) -> None:
    jobs = [{**ECHO, "unique_key": f"k{n}"} for n in range(100)]

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda n: door.bulk(jobs if n % 2 else jobs[::-1]), range(16)))

    assert {reply.status for reply in replies} == {200}
    assert await count_jobs(door.db) == 100


# -- limits ----------------------------------------------------------------------------------------------


async def test_a_bulk_costs_a_token_for_each_job(door: Door) -> None:
    key, _ = await make_key(door.db, rate=0.001, burst=20)

    first, second, third = (door.bulk([ECHO] * 8, key=key) for _ in range(3))

    assert [reply.status for reply in (first, second, third)] == [200, 200, 429]
    assert [reply.headers["ratelimit-remaining"] for reply in (first, second)] == ["12", "4"]
    assert third.body["error"] == "rate_limited"
    # One was taken before the body was read, 3 are left: what is missing are 5, a thousand seconds each.
    assert 4900 < int(third.headers["retry-after"]) <= 5000
    assert await count_jobs(door.db) == 16


async def test_a_bulk_above_the_burst_is_told_the_burst(door: Door) -> None:
    key, _ = await make_key(door.db, rate=1, burst=20)

    reply = door.bulk([ECHO] * 21, key=key)

    assert problem(reply) == (400, "invalid_field", "jobs")
    assert "20" in reply.body["message"]
    assert door.bulk([ECHO] * 19, key=key).status == 200  # one token is gone
    assert await count_jobs(door.db) == 19


async def test_what_may_wait_counts_all_jobs_of_a_bulk(door: Door) -> None:
    key, stored = await make_key(door.db, max_pending=10)

    assert door.bulk([ECHO] * 8, key=key).status == 200
    reply = door.bulk([ECHO] * 3, key=key)

    assert (reply.status, reply.body["error"]) == (429, "backlog_full")
    assert "retry-after" in reply.headers
    assert await count_jobs(door.db, stored.client) == 8
