"""Starts and stops real API servers, makes keys and types for them, and speaks HTTP to them."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from taskd.api.settings import ApiSettings, admin_digest
from taskd.model import apikey
from taskd.model.job import new_id
from taskd.model.jobtype import TypeInfo
from taskd.store import keys, nodes, types
from taskd.store.keys import NewKey, StoredKey
from taskd_email.message import payload_schema

ADMIN = "admin-token-of-the-tests-0123456789abcdef"
ROOT = Path(__file__).resolve().parents[2]

TYPES = (
    TypeInfo(name="echo", handler="echo", plugin="builtin", schema={"type": "object"}),
    TypeInfo(
        name="send_email",
        handler="send_email",
        plugin="taskd_email",
        schema=payload_schema(from_optional=False),
        timeout=30.0,
    ),
    TypeInfo(
        name="resize",
        handler="command",
        plugin="builtin",
        schema={
            "type": "object",
            "properties": {"file": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"}},
            "required": ["file"],
            "additionalProperties": False,
        },
    ),
)
"""What a worker with the e-mail plugin and one command would publish."""


@dataclass
class Reply:
    """An answer as it came."""

    status: int
    headers: Mapping[str, str]
    raw: bytes = field(repr=False)

    @property
    def body(self) -> Any:
        return json.loads(self.raw)


@dataclass
class Server:
    """A running API, its parent's process and where it listens."""

    process: subprocess.Popen[bytes]
    port: int

    def send(
        self,
        method: str,
        path: str,
        *,
        key: str | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30.0,
    ) -> Reply:
        """Send one request on a connection of its own; a `body` that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            return send_on(connection, method, path, key=key, body=body, headers=headers)
        finally:
            connection.close()

    def admin(self, method: str, path: str, body: object = None) -> Reply:
        return self.send(method, path, body=body, headers={"Authorization": f"Bearer {ADMIN}"})

    def raw(self, data: bytes, timeout: float = 20.0) -> bytes:
        """Send bytes as they stand and return all that comes back until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as sock:
            sock.sendall(data)
            parts = []
            try:
                while part := sock.recv(65536):
                    parts.append(part)
            except ConnectionResetError:
                pass
            return b"".join(parts)

    def children(self) -> list[int]:
        """Return the process ids of its children."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return sorted(int(pid) for pid in path.read_text().split())


def send_on(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    *,
    key: str | None = None,
    body: object = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Send one request on an open connection."""
    sent = dict(headers or {})
    if key is not None:
        sent["X-API-Key"] = key
    data = body
    if body is not None and not isinstance(body, bytes):
        data = json.dumps(body).encode()
    if body is not None and "Content-Type" not in sent:
        sent["Content-Type"] = "application/json"
    connection.request(method, path, body=data, headers=sent)  # type: ignore[arg-type]
    answer = connection.getresponse()
    return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())


def settings(url: str, **changes: Any) -> ApiSettings:
    """Return settings of a test's API: unsafe databases allowed, since those of tests don't fsync."""
    plain = ApiSettings(
        database_url=url,
        port=0,
        allow_unsafe=True,
        admin_digests=(admin_digest(ADMIN),),
        rate=1000,
        burst=1000,
    )
    return replace(plain, **changes)


@contextmanager
def running(given: ApiSettings) -> Iterator[Server]:
    """Run an API until the end of the block; its log goes to standard error."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.api.standalone"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}"},
    )
    assert process.stdin is not None
    assert process.stderr is not None
    try:
        process.stdin.write(given.encode())
        process.stdin.close()
        lines = []
        while line := process.stderr.readline():
            lines.append(line.decode())
            if '"event":"serving"' in lines[-1]:
                break
        else:
            raise AssertionError("the API did not start:\n" + "".join(lines))
        port = int(json.loads(lines[-1])["address"].split()[-1])
        log = _forward(process)
        yield Server(process, port)
    finally:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        log.join(5)


def _forward(process: subprocess.Popen[bytes]) -> Any:
    import threading

    assert process.stderr is not None
    stderr = process.stderr

    def work() -> None:
        for line in stderr:
            sys.stderr.write(line.decode(errors="replace"))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


async def publish(db: psycopg.AsyncConnection[Any], infos: Sequence[TypeInfo] = TYPES) -> int:
    """Publish types as a live node would, and return the node."""
    node = await nodes.register(
        db, name="test", host="test", pid=1, version="0", lease=timedelta(hours=1), info="{}"
    )
    await types.publish(db, infos, node=node)
    return node


async def make_key(
    db: psycopg.AsyncConnection[Any], *, pepper: bytes | None = None, **members: Any
) -> tuple[str, StoredKey]:
    """Store a key and return its text and its row."""
    made = apikey.make("tk", secrets.token_bytes(apikey.DICE_BYTES))
    digest = apikey.digest(made.text, pepper)
    given: dict[str, Any] = {"name": "test", "scopes": ["jobs:write", "jobs:read"], **members}
    stored = await keys.create(
        db,
        NewKey(
            id=new_id(int(time.time() * 1000), secrets.token_bytes(10)),
            prefix="tk",
            public_id=made.public_id,
            digest=digest,
            pepper_version=int(pepper is not None),
            fingerprint=apikey.fingerprint(digest),
            **given,
        ),
    )
    assert stored is not None
    return made.text.decode(), stored


async def count_jobs(db: psycopg.AsyncConnection[Any], client: UUID | None = None) -> int:
    cursor = await db.execute(
        "select count(*) from taskd.jobs where %(client)s::uuid is null or client = %(client)s",
        {"client": client},
    )
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


def in_days(days: int, now: datetime) -> str:
    return (now + timedelta(days=days)).strftime("%Y-%m-%d")
