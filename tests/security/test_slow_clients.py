"""Clients that dawdle, sit idle, never read or send too much (F25, F26): the others don't notice.

Scaled to what CI has; `make faults` runs the full numbers of the fault plan.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.api.server import Server, make_key, publish, running, settings

REQUEST_TIMEOUT_S = 2.0
SLACK_S = 5.0
"""How much later than `request_timeout` a dripper may be closed."""
RSS_MOST = 300 << 20


@contextmanager
def open_files(wanted: int) -> Iterator[None]:
    """Let this process have as many sockets as a crowd needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"at most {hard} open files may be had here, and {wanted} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Crowd:
    """Hostile clients of one server; `lasted` are the seconds until each dripper was closed."""

    def __init__(self, server: Server, key: str) -> None:
        self.port = server.port
        self.key = key
        self.lasted: list[float] = []
        self.answers: set[bytes] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._sockets: list[socket.socket] = []

    async def drip(self, start: bytes) -> None:
        """Send `start`, then a byte now and then, until the server has enough."""
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._writers.append(writer)
        writer.write(start)
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof():
                with contextlib.suppress(TimeoutError):
                    self.answers.add((await asyncio.wait_for(reader.read(4096), 0.5))[:13])
                    continue
                writer.write(b"a")
        self.lasted.append(time.monotonic() - began)

    async def idle(self) -> None:
        """Open a connection and say nothing."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._writers.append(writer)

    async def never_read(self) -> None:
        """Ask again and again for something large, and read nothing of it."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        self._sockets.append(sock)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", self.port))
        many = b"GET /openapi.json HTTP/1.1\r\nHost: t\r\n\r\n" * 5000
        with contextlib.suppress(ConnectionError):
            await loop.sock_sendall(sock, many)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
        for sock in self._sockets:
            sock.close()


async def submit_for(server: Server, key: str, duration_s: float) -> list[float]:
    """Submit jobs one after the other on one connection; return how long each took, in seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    body = b'{"type":"echo","payload":{}}'
    head = f"POST /jobs HTTP/1.1\r\nHost: t\r\nX-API-Key: {key}\r\nContent-Type: application/json\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    took: list[float] = []
    end = time.monotonic() + duration_s
    while time.monotonic() < end:
        began = time.monotonic()
        writer.write(request)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        fields = dict(line.lower().split(b": ", 1) for line in answer.split(b"\r\n")[1:-2])
        await reader.readexactly(int(fields[b"content-length"]))
        took.append(time.monotonic() - began)
        await asyncio.sleep(0.005)
    writer.close()
    return took


def rss(pid: int) -> int:
    """Return the memory of a process, in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


async def crowd(
    database_url: str, db: psycopg.AsyncConnection, *, drippers: int, idle: int, readers: int
) -> None:
    await publish(db)
    key, _ = await make_key(db)
    half_head = b"GET /health HTTP/1.1\r\nX-A: "
    half_body = (
        f"POST /jobs HTTP/1.1\r\nHost: t\r\nX-API-Key: {key}\r\nContent-Type: application/json\r\n"
        'Content-Length: 1000\r\n\r\n{"type":"'
    ).encode()
    given = settings(
        database_url, workers=1, request_timeout_s=REQUEST_TIMEOUT_S, rate=100_000, burst=100_000
    )
    with open_files(2 * drippers + idle + readers + 200), running(given) as server:
        hostile = Crowd(server, key)
        tasks = [asyncio.create_task(hostile.idle()) for _ in range(idle)]
        tasks += [asyncio.create_task(hostile.drip(half_head)) for _ in range(drippers)]
        tasks += [asyncio.create_task(hostile.drip(half_body)) for _ in range(drippers)]
        tasks += [asyncio.create_task(hostile.never_read()) for _ in range(readers)]
        took = await submit_for(server, key, REQUEST_TIMEOUT_S + SLACK_S)
        memory = max(map(rss, server.children()))
        await asyncio.wait(tasks, timeout=SLACK_S)
        hostile.close()

    assert len(hostile.lasted) == 2 * drippers
    assert max(hostile.lasted) <= REQUEST_TIMEOUT_S + SLACK_S
    assert hostile.answers <= {b"HTTP/1.1 408 ", b"HTTP/1.1 503 ", b""}
    assert statistics.quantiles(took, n=100)[98] < 0.250, sorted(took)[-10:]
    assert memory < RSS_MOST


async def test_a_crowd_of_slow_clients_slows_nobody_else(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    await crowd(database_url, db, drippers=200, idle=500, readers=50)


@pytest.mark.fault
async def test_the_crowd_of_the_fault_plan_slows_nobody_else(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    await crowd(database_url, db, drippers=2000, idle=10_000, readers=200)


async def post(server: Server, key: str, length: int, body: bytes) -> tuple[int, str]:
    """Announce a body of `length` bytes, send `body` of it, and return status and code of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        f"POST /jobs HTTP/1.1\r\nHost: t\r\nX-API-Key: {key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n".encode()
        + body
    )
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    answer = json.loads(await reader.readexactly(int(fields[b"content-length"])))
    writer.close()
    return int(head.split(b" ")[1]), answer.get("error", "")


async def test_bodies_that_are_too_large_are_refused_by_their_head_and_cost_no_memory(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    await publish(db)
    key, _ = await make_key(db)
    with running(settings(database_url, workers=1)) as server:
        await post(server, key, 2, b"{}")
        before = rss(server.children()[0])
        answers = await asyncio.gather(*(post(server, key, 10_000_000, b"") for _ in range(200)))
        grown = rss(server.children()[0]) - before

    assert set(answers) == {(413, "too_large")}
    assert grown < 200 * (2 << 20) / 10  # far below the 2 MB each that the plan allows


async def test_large_bodies_that_are_allowed_cost_little_more_than_themselves(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    await publish(db)
    key, _ = await make_key(db)
    body = json.dumps({"type": "echo", "payload": {"v": "x" * 1_000_000}}).encode()
    with running(settings(database_url, workers=1)) as server:
        await post(server, key, 2, b"{}")
        before = rss(server.children()[0])
        answers = await asyncio.gather(*(post(server, key, len(body), body) for _ in range(50)))
        grown = rss(server.children()[0]) - before

    assert {status for status, _ in answers} <= {200, 503}
    assert grown < 50 * 5 * len(body)
