"""Runs the tables of hostile requests (`tests/data/cases`) against a real server on a real database."""

from __future__ import annotations

import base64
import http.client
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg

from taskd.model import apikey
from taskd.store.keys import StoredKey
from tests.api.server import ADMIN, Server, in_days, make_key, publish, running, settings

FOLDER = Path(__file__).parents[1] / "data/cases"


def load(name: str) -> dict[str, dict[str, Any]]:
    """Return the cases of a table by their ids, in its order."""
    return {case["id"]: case for case in json.loads((FOLDER / name).read_text())["cases"]}


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


@asynccontextmanager
async def make_world(database_url: str, **changes: Any) -> AsyncIterator[World]:
    """Run a server with the types and keys that the tables assume; `changes` are its settings."""
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as db:
        await publish(db)
    with running(settings(database_url, **changes)) as server:
        yield await furnish(server, database_url, ADMIN)


async def furnish(server: Server, database_url: str, admin: str, pepper: bytes | None = None) -> World:
    """Make the keys and the job that the tables assume, for a server that knows their types."""
    now = datetime.now(UTC)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as db:

        async def key_of(**members: Any) -> tuple[str, StoredKey]:
            return await make_key(db, pepper=pepper, **members)

        key, stored = await key_of(rate=1000, burst=1000)
        read_only, _ = await key_of(client=stored.client, scopes=["jobs:read"])
        write_only, _ = await key_of(client=stored.client, scopes=["jobs:write"])
        email_only, _ = await key_of(types=["send_email"])
        other, _ = await key_of()
        expired, _ = await key_of(expires_at=now - timedelta(seconds=1))
        revoked, gone = await key_of()
        await db.execute("update taskd.api_keys set revoked_at = now() where id = %s", (gone.id,))
    unknown = apikey.make("tk", bytes(range(48))).text.decode()
    job = server.send("POST", "/jobs", key=key, body={"type": "echo", "payload": {}})
    assert job.status == 200, job.raw
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
        "{ADMIN}": admin,
        "{ADMIN_HALF}": admin[: len(admin) // 2],
        "{JOB_ID}": job.body["job_id"],
        "{D+30}": in_days(30, now),
        "{D+366}": in_days(366, now),
    }
    return World(server, database_url, server.children(), key, fixtures, [stored.digest])


def send(world: World, request: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    """Send the request of a case as it stands, and return status, headers (small letters) and body."""
    if "raw_b64" in request or "raw_gen" in request:
        if "raw_gen" in request:
            data = "".join(map(_generate, request["raw_gen"])).encode("latin-1")
        else:
            data = base64.b64decode(request["raw_b64"])
        return _parse(world.server.raw(data.replace(b"{KEY}", world.fixtures["{KEY}"].encode())))
    headers = {name: world.fill(value) for name, value in request.get("headers", {}).items()}
    body: bytes | None = None
    if "body_text" in request:
        body = world.fill(request["body_text"]).encode()
    elif "body_b64" in request:
        body = base64.b64decode(request["body_b64"])
    elif "body_gen" in request:
        body = "".join(map(_generate, request["body_gen"])).encode()
    connection = http.client.HTTPConnection("127.0.0.1", world.server.port, timeout=30)
    try:  # not `server.send`: it adds a Content-Type
        connection.request(request["method"], world.fill(request["path"]), body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def _generate(part: Any) -> str:
    if isinstance(part, str):
        return part
    if "repeat" in part:
        return str(part["repeat"]) * int(part["count"])
    return "".join(str(part["repeat_numbered"]).replace("{n}", str(n)) for n in range(part["count"]))


def _parse(raw: bytes) -> tuple[int, dict[str, str], bytes]:
    """Take the first answer apart, a `100 Continue` before it left out."""
    if not raw:
        return 0, {}, b""
    head, _, body = raw.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split(" ")[1]), headers, body[: int(headers.get("content-length", 0))]


def judge(
    world: World,
    case: dict[str, Any],
    status: int,
    headers: dict[str, str],
    raw: bytes,
    stored: int,
    took_s: float,
) -> Iterator[str]:
    """Yield what is wrong with an answer."""
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
