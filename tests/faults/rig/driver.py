"""Submits jobs over HTTP at a given rate and keeps a ledger of what was accepted.

An id counts as accepted once it is on disk. What the client can't know stays unknown: a 503, a broken
connection, no answer. Everything random comes from the seed, so a run can be repeated.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ANSWER_S = 15.0
"""An answer that takes longer counts as none."""
PAUSE_S = 0.05
"""Between a refused connection and the next try."""


class NoAnswer(Exception):
    """The connection broke, or stayed silent, after the request was sent."""


class NotSent(Exception):
    """No connection could be made: the request was never sent."""


class Wire:
    """One keep-alive connection to the API."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(
        self, method: str, path: str, headers: Mapping[str, str], body: object = None
    ) -> tuple[int, Any]:
        """Send one request and return status and JSON of its answer.

        Raises:
            NotSent: nobody listens.
            NoAnswer: it was sent, and no whole answer came.
        """
        if self._streams is None:
            try:
                self._streams = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError as error:
                raise NotSent(str(error)) from error
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n"
        head += "Content-Type: application/json\r\n" if data else ""
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._exchange(head.encode() + b"\r\n" + data)
        except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
            self.close()
            raise NoAnswer(f"{type(error).__name__}: {error}") from error

    async def _exchange(self, request: bytes) -> tuple[int, Any]:
        assert self._streams is not None
        reader, writer = self._streams
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 : head.index(b"\r\n", at)]) if at >= 0 else 0
        content = await reader.readexactly(length) if length else b""
        if b"connection: close" in head:
            self.close()
        return int(head[9:12]), json.loads(content) if content else None

    def close(self) -> None:
        """Drop the connection; the next request makes another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Ledger:
    """A file of accepted ids, one a line with the number of its submit; flushed many at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._lines: list[str] = []
        self._flush: asyncio.Task[None] | None = None

    async def write(self, number: int, job_id: str) -> None:
        """Return once the line is on disk."""
        self._lines.append(f"{number} {job_id}\n")
        while self._lines:
            if self._flush is None or self._flush.done():
                self._flush = asyncio.create_task(self._write())
            await asyncio.shield(self._flush)
        if self._flush is not None:
            await asyncio.shield(self._flush)

    async def _write(self) -> None:
        lines, self._lines = self._lines, []
        await asyncio.to_thread(self._store, "".join(lines).encode())

    def _store(self, data: bytes) -> None:
        os.write(self._fd, data)
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


@dataclass(slots=True)
class Tally:
    """What became of the submits, by their numbers."""

    next: int = 0
    sent: set[int] = field(default_factory=set)
    accepted: dict[int, str] = field(default_factory=dict)
    unknown: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    """Answered with a 4xx, or never sent: no row may exist."""
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Answers that no client should ever see."""
    seconds: list[float] = field(default_factory=list)
    accepted_at: list[float] = field(default_factory=list)
    """Monotonic moments of the accepted ones, in order."""

    def __str__(self) -> str:
        return (
            f"submitted {len(self.sent)}, accepted {len(self.accepted)}, unknown {len(self.unknown)}, "
            f"refused {len(self.refused)}, answers {dict(self.statuses)}"
        )


Body = Callable[[int], dict[str, object]]


def mixed(
    seed: int, *, raises: float = 0.05, long: float = 0.0, sync: float = 0.1, long_ms: int = 5000
) -> Body:
    """Return the base load: jobs of 20 to 200 ms, a share that raises, one that takes long, one in `def`.

    Half of those that raise do so once, half always.
    """

    def body(n: int) -> dict[str, object]:
        dice = random.Random(f"{seed}:{n}")
        payload = {"n": n, "ms": dice.randint(20, 200)}
        if dice.random() < long:
            payload["ms"] = long_ms
        if dice.random() < raises:
            payload["fails"] = dice.choice((1, 100))
        return {"type": "ledger_sync" if dice.random() < sync else "ledger", "payload": payload}

    return body


class Driver:
    """One client with one key. Owned by the case that makes it."""

    def __init__(self, port: int, key: str, ledger: Ledger, *, repeat: bool = False) -> None:
        """`repeat`: every submit has a `unique_key` and is sent until it is answered with 2xx."""
        self._port = port
        self._headers = {"X-API-Key": key}
        self._ledger = ledger
        self._repeat = repeat
        self.tally = Tally()
        self.ended = False

    async def run(self, body: Body, *, rate: float, seconds: float, connections: int = 16) -> Tally:
        """Submit `rate` jobs a second for `seconds`; a silent server makes it fall behind, then catch up."""
        begin, end = self.tally.next, self.tally.next + round(rate * seconds)
        self.tally.next = end
        numbers = iter(range(begin, end))
        started = time.monotonic()

        async def work() -> None:
            wire = Wire(self._port)
            for n in numbers:
                await asyncio.sleep(max(0.0, started + (n - begin) / rate - time.monotonic()))
                await self._submit(wire, n, body(n))
            wire.close()

        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(work())
        self.ended = True
        return self.tally

    async def _submit(self, wire: Wire, n: int, body: dict[str, object]) -> None:
        tally = self.tally
        tally.sent.add(n)
        if self._repeat:
            body["unique_key"] = f"number {n}"
        while True:
            began = time.monotonic()
            again = await self._try(wire, n, body)
            tally.seconds.append(time.monotonic() - began)
            if not (again and self._repeat):
                return
            await asyncio.sleep(PAUSE_S)

    async def _try(self, wire: Wire, n: int, body: dict[str, object]) -> bool:
        """Send once; whether it is worth sending again."""
        tally = self.tally
        try:
            status, answer = await wire.request("POST", "/jobs", self._headers, body)
        except NotSent:
            if n not in tally.unknown:
                tally.refused.add(n)
            await asyncio.sleep(PAUSE_S)
            return True
        except NoAnswer:
            tally.refused.discard(n)
            tally.unknown.add(n)
            return True
        tally.statuses[status] += 1
        if status == 200:
            await self._ledger.write(n, answer["job_id"])
            tally.unknown.discard(n)
            tally.refused.discard(n)
            tally.accepted[n] = answer["job_id"]
            tally.accepted_at.append(time.monotonic())
            return False
        if status == 503:
            tally.refused.discard(n)
            tally.unknown.add(n)
            return True
        if n not in tally.unknown:
            tally.refused.add(n)
        if status not in (400, 429):
            tally.wrong.append(f"{n}: {status} {answer}")
        return False


def gaps(moments: list[float], since: list[float]) -> list[float]:
    """Return, for each moment of `since`, the seconds until the next one of `moments`."""
    return [min((at - one for at in moments if at >= one), default=float("inf")) for one in since]
