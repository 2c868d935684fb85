"""Hostile clients in numbers, and what they cost an API process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


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

    def __init__(self, port: int, key: str) -> None:
        self.port = port
        self.lasted: list[float] = []
        self.heads: set[bytes] = set()
        """Heads of the answers to drippers, without what differs from one to the next."""
        self._half_head = b"GET /health HTTP/1.1\r\nX-A: "
        self._half_body = (
            f"POST /jobs HTTP/1.1\r\nHost: t\r\nX-API-Key: {key}\r\nContent-Type: application/json\r\n"
            'Content-Length: 1000\r\n\r\n{"type":"'
        ).encode()
        self._writers: list[asyncio.StreamWriter] = []
        self._sockets: list[socket.socket] = []
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def answers(self) -> set[bytes]:
        """The beginnings of the answers to drippers; none is empty."""
        return {head[:13] for head in self.heads}

    def gather(self, *, drippers: int, idle: int, readers: int) -> None:
        """Let them loose: so many that drip heads, and as many that drip bodies."""
        work = [self._idle() for _ in range(idle)]
        work += [self._drip(self._half_head) for _ in range(drippers)]
        work += [self._drip(self._half_body) for _ in range(drippers)]
        work += [self._never_read() for _ in range(readers)]
        self._tasks += [asyncio.create_task(one) for one in work]

    async def over(self, timeout_s: float) -> None:
        """Wait until all drippers were closed, or for so long."""
        await asyncio.wait(self._tasks, timeout=timeout_s)

    async def _drip(self, start: bytes) -> None:
        """Send `start`, then a byte now and then, until the server has enough."""
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._writers.append(writer)
        writer.write(start)
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof():
                with contextlib.suppress(TimeoutError):
                    self.heads.add(_shape(await asyncio.wait_for(reader.read(4096), 0.5)))
                    continue
                writer.write(b"a")
        self.lasted.append(time.monotonic() - began)

    async def _idle(self) -> None:
        """Open a connection and say nothing."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._writers.append(writer)

    async def _never_read(self) -> None:
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

    async def close(self) -> None:
        """Send everybody home."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
        for sock in self._sockets:
            sock.close()


def _shape(answer: bytes) -> bytes:
    lines = answer.partition(b"\r\n\r\n")[0].split(b"\r\n")
    return b"\r\n".join(line for line in lines if not line.lower().startswith((b"x-request-id", b"date")))


async def submit_for(port: int, key: str, body: bytes, duration_s: float) -> list[float]:
    """Submit jobs one after the other on one connection; return how long each took, in seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
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


async def post(port: int, key: str, length: int, body: bytes) -> tuple[int, str]:
    """Announce a body of `length` bytes, send `body` of it, and return status and code of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
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


def rss(pid: int) -> int:
    """Return the memory of a process, in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def forget_peak(pid: int) -> None:
    """Have `peak` count from now on."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak(pid: int) -> int:
    """Return the most memory that a process had since `forget_peak`, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not tell")
