"""Every hostile request of `tests/data/cases/bad_http.json`, against a real server on a real database."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from taskd.model import apikey
from tests.api.server import ADMIN, Server, count_jobs, in_days, make_key, publish, running, settings

DATA = json.loads((Path(__file__).parents[1] / "data/cases/bad_http.json").read_text())
CASES = {case["id"]: case for case in DATA["cases"]}

LATER = {
    "wh-decimal": "the webhook type comes with a later version",
    "wh-short": "the webhook type comes with a later version",
    "wh-v6": "the webhook type comes with a later version",
    "wh-userinfo": "the webhook type comes with a later version",
}
ELSEWHERE = {
    "st-db-hang": "test_outages: needs a database of its own to freeze",
    "st-db-readonly": "test_outages: needs a database of its own to demote",
    "st-draining": "test_serve: ends its server",
    "st-badkey-flood": "test_keys: would refuse the wrong keys of the other cases",
}
HERE = [case_id for case_id in CASES if case_id not in LATER | ELSEWHERE]


@dataclass
class World:
    """The server that all cases share, and what their placeholders stand for."""

    server: Server
    url: str
    children: list[int]
    key: str
    fixtures: dict[str, str] = field(default_factory=dict)
    digests: list[bytes] = field(default_factory=list)

    def fill(self, text: str) -> str:
        for name, value in self.fixtures.items():
            text = text.replace(name, value)
        return text

    def leaks(self, raw: bytes) -> list[str]:
        """Return what an answer shows that none may show."""
        text = raw.decode("utf-8", "replace")
        found = [name for name, value in self.fixtures.items() if name in SECRETS and value in text]
        found += [
            word for word in ("Traceback", "select ", "insert into", "/site-packages/", ".py") if word in text
        ]
        found += [digest.hex() for digest in self.digests if digest.hex() in text]
        return found


SECRETS = ("{KEY}", "{KEY_RO}", "{KEY_WO}", "{KEY_OTHER}", "{KEY_EMAIL_ONLY}", "{ADMIN}", "{KEY_UNKNOWN}")


@pytest.fixture
async def world(database_url: str) -> Any:
    now = datetime.now(UTC)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as db:
        await publish(db)
        key, stored = await make_key(db, rate=1000, burst=1000)
        read_only, _ = await make_key(db, client=stored.client, scopes=["jobs:read"])
        write_only, _ = await make_key(db, client=stored.client, scopes=["jobs:write"])
        email_only, _ = await make_key(db, types=["send_email"])
        other, _ = await make_key(db)
        expired, _ = await make_key(db, expires_at=now - timedelta(seconds=1))
        revoked, gone = await make_key(db)
        await db.execute("update taskd.api_keys set revoked_at = now() where id = %s", (gone.id,))
        unknown = apikey.make("tk", bytes(range(48))).text.decode()
        with running(settings(database_url)) as server:
            job = server.send("POST", "/jobs", key=key, body={"type": "echo", "payload": {}})
            flipped = key[:-1] + ("a" if key[-1] != "a" else "b")
            fixtures = {
                "{KEY}": key,
                "{KEY_RO}": read_only,
                "{KEY_WO}": write_only,
                "{KEY_EMAIL_ONLY}": email_only,
                "{KEY_OTHER}": other,
                "{KEY_EXPIRED}": expired,
                "{KEY_REVOKED}": revoked,
                "{KEY_UNKNOWN}": unknown,
                "{KEY_FLIPPED}": flipped,
                "{KEY_PREFIX}": key.split("-")[0],
                "{KEY_HASH}": stored.digest.hex(),
                "{KEY_UPPER}": key.upper(),
                "{ADMIN}": ADMIN,
                "{ADMIN_HALF}": ADMIN[: len(ADMIN) // 2],
                "{JOB_ID}": job.body["job_id"],
                "{D+30}": in_days(30, now),
                "{D+366}": in_days(366, now),
            }
            yield World(server, database_url, server.children(), key, fixtures, [stored.digest])


async def test_every_case_gets_its_answer(world: World) -> None:
    wrong: list[str] = []
    async with await psycopg.AsyncConnection.connect(world.url, autocommit=True) as db:
        for case_id in HERE:
            case = CASES[case_id]
            world.fixtures["{KEY}"] = world.key
            await _set_up(world, db, case_id)
            before = await count_jobs(db)
            began = time.monotonic()
            status, headers, raw = _send(world, case["request"])
            took_s = time.monotonic() - began
            stored = await count_jobs(db) - before
            wrong += [
                f"{case_id}: {problem}"
                for problem in _judge(world, case, status, headers, raw, stored, took_s)
            ]

    assert wrong == []
    assert world.server.children() == world.children


def test_every_case_is_run_or_named() -> None:
    assert set(LATER) | set(ELSEWHERE) <= set(CASES)


async def _set_up(world: World, db: psycopg.AsyncConnection[Any], case_id: str) -> None:
    body: dict[str, Any] = {"type": "echo", "payload": {}}
    if case_id == "st-unique-same":
        first = json.loads(CASES[case_id]["request"]["body_text"])
        assert world.server.send("POST", "/jobs", key=world.fixtures["{KEY}"], body=first).status == 200
    elif case_id == "st-unique-other-client":
        body["unique_key"] = "k3"
        assert world.server.send("POST", "/jobs", key=world.fixtures["{KEY_OTHER}"], body=body).status == 200
    elif case_id in ("st-rate", "st-rate-before-body"):
        world.fixtures["{KEY}"], _ = await make_key(db, rate=1, burst=10)
        statuses = [
            world.server.send("POST", "/jobs", key=world.fixtures["{KEY}"], body=body).status
            for _ in range(10)
        ]
        assert statuses == [200] * 10


def _send(world: World, request: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    if "raw_b64" in request:
        data = base64.b64decode(request["raw_b64"]).replace(b"{KEY}", world.fixtures["{KEY}"].encode())
        return _parse(world.server.raw(data))
    headers = {name: world.fill(value) for name, value in request.get("headers", {}).items()}
    body: bytes | None = None
    if "body_text" in request:
        body = world.fill(request["body_text"]).encode()
    elif "body_b64" in request:
        body = base64.b64decode(request["body_b64"])
    elif "body_gen" in request:
        body = "".join(_generate(part) for part in request["body_gen"]).encode()
    reply = world.server.send(request["method"], world.fill(request["path"]), headers=headers, body=body)
    return reply.status, dict(reply.headers), reply.raw


def _generate(part: Any) -> str:
    if isinstance(part, str):
        return part
    if "repeat" in part:
        return str(part["repeat"]) * int(part["count"])
    return "".join(str(part["repeat_numbered"]).replace("{n}", str(n)) for n in range(part["count"]))


def _parse(raw: bytes) -> tuple[int, dict[str, str], bytes]:
    if not raw:
        return 0, {}, b""
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split(" ")[1]), headers, body


def _judge(
    world: World,
    case: dict[str, Any],
    status: int,
    headers: dict[str, str],
    raw: bytes,
    stored: int,
    took_s: float,
) -> Iterator[str]:
    expect = case["expect"]
    wanted = expect["status"] if isinstance(expect["status"], list) else [expect["status"]]
    if status not in wanted:
        yield f"status {status}, not {wanted}: {raw[:300]!r}"
        return
    if stored != expect["jobs_stored"]:
        yield f"{stored} rows stored, not {expect['jobs_stored']}"
    if took_s > expect.get("within_s", 10):
        yield f"took {took_s:.1f} s"
    if status == 0:
        return
    if "x-request-id" not in headers or headers.get("cache-control") != "no-store" or "server" in headers:
        yield f"headers {headers}"
    if case["request"].get("path") != "/admin/api-keys" or status != 200:
        if leaks := world.leaks(raw):
            yield f"shows {leaks}"
        if b"key_hash" in raw:
            yield "shows key_hash"
    for secret in expect.get("body_must_not_contain", []):
        if world.fill(secret).encode() in raw:
            yield f"shows {secret}"
    if status >= 400:
        body = json.loads(raw)
        if not {"message", "error", "fields", "request_id"} <= set(body):
            yield f"members {sorted(body)}"
        if body["request_id"] != headers.get("x-request-id"):
            yield "request_id is not X-Request-Id"
        if "error" in expect and body["error"] != expect["error"]:
            yield f"error {body['error']}, not {expect['error']}"
        if "field" in expect and expect["field"] not in [one["path"] for one in body["fields"]]:
            yield f"fields {body['fields']}, not {expect['field']}"
    if expect.get("allow_header") and not headers.get("allow"):
        yield "no Allow"
    if "retry_after" in expect and not re.fullmatch("[1-9][0-9]*", headers.get("retry-after", "")):
        yield f"Retry-After {headers.get('retry-after')}"
